"""A task for lm-evaluation-harness (``psykern lm-eval --include_path`` this folder): the sample as multiple choice."""
