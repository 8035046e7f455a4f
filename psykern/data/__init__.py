"""From files to tokens: rows, transcripts, conditions, encoded units. Knows neither torch nor a model."""
