"""Localizers, one a file. Each is a frozen dataclass of hyperparameters whose call returns `Scores`.

scores = PrivacyNeurons(steps=20)(model, prompts)        # Scores, one row per prompt
mask = scores.vote(above=0.1, share=0.5, keep=200)       # ComponentMask
"""
