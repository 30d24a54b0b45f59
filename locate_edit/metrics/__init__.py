"""What a model does on a prompt set, as numbers with a definition, a direction and a precondition.

Every metric is a function `metric(predictions, **options) -> Values`; `metric(model, prompts)` works too. One
`Predictions` serves them all with a single forward pass over the data. One concept a file.
"""
