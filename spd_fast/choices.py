"""What settings are chosen from; free of torch, so that the command line has it at once."""

RECIPES = ("simsiam", "moco", "simclr", "supervised")
SPD_LOSSES = ("cosine", "xent")
SPD_SOURCES = ("anchor", "image")
LOCAL_AUGS = ("smoothblend", "cutpaste")
OPTIMIZERS = ("sgd", "lars")
SCHEDULES = ("cosine", "steps")
PRECISIONS = ("float32", "bfloat16", "float16")
