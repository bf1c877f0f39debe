"""Parts of ``scripts/train_sample.py``: the text, the model and the adapter of the sample."""
