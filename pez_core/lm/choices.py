"""The values of options that take one of several names; importable without torch."""

# Keys of `pez_core.lm.METHODS`.
METHOD_NAMES = (
    "pez",
    "autoprompt-sgd",
    "fluentprompt",
    "soft-prompt",
    "pez-as-released",
    "empty",
)
# Keys of `pez_core.lm.TASKS`.
TASK_NAMES = (
    "sst2",
    "amazon-polarity",
    "ag-news",
    "movie-reviews",
    "amazon-reviews",
    "sources",
)
OPTIMIZERS = ("adafactor", "adamw")
DTYPES = ("float32", "bfloat16", "float16")
