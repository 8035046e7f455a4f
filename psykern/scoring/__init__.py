"""A loaded model that scores: checkpoint, tokenizer and engine together, and the table of records."""
