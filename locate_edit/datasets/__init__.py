"""Public data sets as prompt sets, one a file, from a local folder or from the Hugging Face hub.

Nothing is shipped, and nothing is downloaded unless a hub name is given (which needs `pip install datasets`). Most
files have ``rows(source, ...)``, plain mappings with the fields of `locate_edit.rows.ROW_SCHEMA` and whatever else
the data set holds, and ``prompts(source, tokenizer, ...)``. `PromptSet.audit` shows which tokens of a row are scored.
"""
