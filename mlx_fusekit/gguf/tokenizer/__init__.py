"""From a tokenizer to the keys ``tokenizer.*``."""
