"""What a model does on a prompt set, as numbers with a definition, a direction and a precondition.

Every metric is a function `metric(predictions, **options) -> Values`; `metric(model, prompts)` works too. One
`Predictions` serves them all with a single forward pass over the data. One concept a file.

What is no average over items is a `Statistic`, made from the values of several sets or models: `auc` and `privleak`
(`membership`), `forget_quality`, `model_utility`, `icat` and `equalised_odds` (`bias`), `edit_score` (`counterfact`).

What looks inside several models is neither: `unlearning_depth` tells from three models' residual streams which layers
still carry an answer, and gives values with a table by layer.
"""
