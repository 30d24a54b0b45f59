"""Attempts to bring back what an edit took away: one attack a file, all with the interface of `locate_edit.attacked`.

An attack is a frozen dataclass of hyperparameters with ``attack(model, forget, retain=..., batch_size=..., seed=...) ->
Attacked``. It leaves the model as it found it, bit for bit.
"""
