"""What settings are chosen from; free of torch, so that the command line has it at once."""

RECIPES = ("simsiam", "moco", "simclr", "supervised")
SPD_LOSSES = ("cosine", "xent")
SPD_SOURCES = ("anchor", "image")
LOCAL_AUGS = ("smoothblend", "cutpaste")
OPTIMIZERS = ("sgd", "lars")
SCHEDULES = ("cosine", "steps")
DALI_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
LOADERS = ("auto", "torch", "dali")  # who makes the batches of views
PRECISIONS = ("float32", "bfloat16", "float16")

# Of `evaluate`: which protocols a method is for.
ONE_CLASS, TWO_CLASS = ("1cls",), ("2cls_highshot", "5shot", "10shot")
METHODS = {
    "padim": ONE_CLASS,
    "patchcore": ONE_CLASS,
    "classifier": TWO_CLASS,
    "unet": TWO_CLASS,
}
FACTOR_DTYPES = ("float32", "float16", "bfloat16", "int8")

# Where `adapt` differs from its recipe, which is made for ImageNet: here some hundred images and
# weights that are good already. Chosen by these reasons, not tuned on VisA. The learning rate is
# the recipe's, times the square root of the batch's share of the recipe's batch: for SimSiam 0.025,
# a quarter. In proportion to the batch it would be 0.006, with which the new heads, and so the
# backbone, learn next to nothing in so few steps.
ADAPT = {
    "batch_size": 32,  # 14 to 28 steps per epoch of VisA; MVTec-AD's smallest category fills one
    "epochs": 20,  # some hundred steps, as what can be learnt from so few images is soon learnt
    "warmup_epochs": 0,  # the rate is low from the start
    "queue_size": 256,  # MoCo: fewer than VisA's images, so its random first keys soon go
}
