"""From data to a folder of records: one run, on one machine or many."""
