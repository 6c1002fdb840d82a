r"""Fine-tune a model on labelled shards and test it on patients that it has not seen.

    python -m usfmae_jax.finetune --config=finetune:busbra --config.init=runs/pretrain-tiny
    python -m usfmae_jax.finetune --config=finetune:busbra --config.model.arch=resnet50
    python -m usfmae_jax.finetune --config=finetune:folder_regression --config.data.path=data/mine \
        --config.targets=table.csv --config.target="ejection fraction"

One command trains every member (each fold, seed and label fraction); small models on a CPU train side by side, one per
core. It writes results.json, results.md, predictions.csv and report.html to the workdir; splits/ says who was trained
and tested on. The weights with the best validation score are the ones that are tested. More seeds, fractions or folds
may be added to a finished run.

Without --config.init the same model starts from random weights: the baseline to beat. Settings are meant for 500 to
2,000 images and a small model on a CPU; they were tuned on no dataset. ViT-B: 10 GiB of an H100.

`config.task` is what is learnt: "classification", the class that the shards' label names; "regression", a number for
each frame; "multilabel", any subset of several labels; "segmentation", see --config=segment. The numbers for regression
and the labels for multilabel are columns of a CSV file, `config.targets`, which are called "name" or "name [unit]"; its
column frame, source or file names the frames. Labels are 0, 1 or empty.

Variants
  :folder  any labelled shards (data_prep.build --labels); 5 folds by patient unless the shards bring a split
  :busbra  BUS-BRA, benign or malignant, its official 5 folds; 1,875 images
  :mmotu   MMOTU-2D, eight ovarian classes, its official train and test parts; 1,469 images
  :gist514 GIST514-DB, leiomyoma or GIST, its official 5 folds; 514 images
  :folder_regression  any shards, a number from a table
  :folder_multilabel  any shards, several labels of 0 and 1 from a table
  :hc18    HC18, head circumference in mm from its table; 999 images
  :folder_mae :busbra_mae :mmotu_mae :gist514_mae   the same with MAE's fine-tuning recipe for ViT-B
"""

import ml_collections


def get_config(variant: str = "folder") -> ml_collections.ConfigDict:
    """The run's settings; every field can be overridden with `--config.field=value`."""
    config = ml_collections.ConfigDict()
    config.task = "classification"  # what is learnt, see usfmae_jax/tasks
    config.seed = 0  # seed of the splits; also added to the seeds below
    config.seeds = (0,)  # seeds of initial weights, data order and label fractions: one member per seed
    # Initial weights: "usfmae-tiny", which is included; a workdir, an encoder or classifier directory, or a ResNet-50
    # weights file;
    config.init = ""  # "" = random weights
    config.classes = ()  # expected class names, in order; () = those of the shards
    config.positive = ""  # the positive class where there are two; "" = the last
    config.model = dict(
        arch="",  # tiny, small, base, large, huge, resnet50; "" = that of config.init, else tiny
        # () and 0, here and below: the value of config.init or arch.
        image_size=(),  # height, width; if it differs from config.init's, position embeddings are interpolated
        channels=0,  # input channels
        patch_size=0,  # side of a patch in pixels
        width=0,  # token width; for a ResNet: channels of the stem
        depth=0,  # number of blocks; for a ResNet: blocks in each of its four stages
        num_heads=0,  # attention heads
        mean=(),  # mean of each input channel, subtracted from pixels in [0, 1]
        std=(),  # standard deviation of each input channel, by which the result is divided
        pool="mean",  # the mean of the patch tokens; or "cls", the class token
        drop_path=0.1,  # stochastic depth: rate of the last block, growing linearly from 0 in the first
        dtype="float32",  # compute dtype; bfloat16 for a GPU or TPU
        attention="",  # "xla", "cudnn", or "" for JAX's own choice
        scan=False,  # compile one block and loop over it: quicker to compile, slower on a CPU
        remat="none",  # what the backward pass recomputes to save memory: "none", "dots" or "full", see pretrain
    )
    # What is trained: full (everything), frozen (the head only), last_k (the last blocks and the head), lora (low-rank
    # updates of the attention matrices, and the head).
    config.mode = "full"
    config.last_k = 4  # number of blocks for mode last_k; for a ResNet: of stages
    config.lora_rank = 8  # rank for mode lora
    config.data = dict(
        path="",  # labelled shards: a folder or a glob; separate several with commas
        split="",  # only this TFDS split; "" = all
        channels=1,  # decoded channels: 1 (grey, repeated on the device for a model with 3) or 3 for Doppler
        max_damaged=0.01,  # maximum fraction of unreadable records
        workers=0,  # decoding processes; 0 = threads only
        threads=2,  # decoding threads in each process
    )
    config.split = dict(
        kind="auto",  # official, shards, group, single; auto = path, else official, else shards, else group
        path="",  # a CSV file with the columns frame, part and optionally fold; or a folder of them, as a run's splits/
        folds=5,  # number of folds for kind group
        validation=0.2,  # fraction of the training patients, if the split has no validation part
        test=0.2,  # fraction of the patients, for kind single
        only=(),  # names of folds to run; () = all
        duplicates=True,  # look for the same image under two patients, and keep it on one side of the split
        copies="drop",  # copies of test images in other parts: "drop", or "keep" to follow a published split exactly
        no_copies="",  # a CSV file: rows of a run's duplicates.csv that a person judged to be different images
    )
    config.fractions = (1.0,)  # fractions of the training patients to learn from: one member per fraction
    config.augment = dict(
        crop_scale=(0.6, 1.0),  # fraction of the area; a lesion should stay in view
        crop_ratio=(3 / 4, 4 / 3),  # aspect ratio of a crop: width to height
        rotation=(-10.0, 10.0),  # rotation in degrees
        hflip=0.5,  # probability of a mirrored view
        vflip=0.0,  # probability of an upside-down view; depth is not symmetric
        interpolation="linear",  # "linear", "cubic" or "nearest"
        brightness=(-0.1, 0.1),  # gain, added as a fraction of the grey scale
        contrast=(0.8, 1.25),  # contrast factor (dynamic range)
        gamma=(0.8, 1.25),  # exponent of the grey map
        randaugment_magnitude=0.0,  # mean strength, up to 10; 0 = off
        randaugment_ops=2,  # RandAugment operations per view
        trivialaugment=False,  # instead of RandAugment: one of its operations, at a random strength
    )
    config.regularization = dict(
        mixup=0.0,  # Mixup: a in Beta(a, a); 0 = off
        cutmix=0.0,  # CutMix: likewise
        smoothing=0.1,  # label smoothing
        erasing=0.0,  # probability that a rectangle is erased
        class_weights="none",  # class weights in the loss; "balanced" = all classes count equally
        balanced_sampling=False,  # sample all classes equally often
    )
    config.optimizer = dict(
        learning_rate=4e-3,  # peak rate per 256 images; 5e-4 at batch 32
        floor=1e-6,  # learning rate at the end
        warmup=0.1,  # fraction of all steps
        weight_decay=0.05,  # applied to matrices only
        b1=0.9,  # Adam: decay rate of the first moment
        b2=0.999,  # Adam: decay rate of the second moment
        clip_norm=1.0,  # maximum norm of the gradient; 0 = off
        layer_decay=0.75,  # for a ViT: each layer's learning rate is that of the next one times this; 1 = off
    )
    config.train = dict(
        batch_size=32,  # images per update, over all devices
        accumulate=1,  # micro-batches per update
        epochs=25.0,  # passes over the training images
        steps=0,  # updates; overrides epochs if greater than 0
        min_steps=200,  # minimum number of updates, so that small sets are seen more often
        skip_nonfinite=0,  # how many steps with a non-finite loss or gradient each member may skip
    )
    config.stop = dict(
        metric="auroc",  # validation metric; the weights with the best value are tested
        every=1.0,  # epochs between evaluations
        patience=0,  # a member stops after this many evaluations without improvement; 0 = off
    )
    # Members trained in parallel on a CPU: 0 = as many as end soonest if the model is small; 1 = one after another.
    config.parallel = 0
    config.mesh = dict(
        data=-1,  # devices that the batch is split over; -1 = all remaining devices
        fsdp=1,  # devices that split the batch and also shard parameters and optimiser state
    )
    config.checkpoint = dict(
        every=5,  # evaluations between checkpoints
        keep_finished=False,  # keep the checkpoints of finished members too; their classifier/ is always kept
        fallback=False,  # resume from an older checkpoint if the newest is damaged
    )
    config.log = dict(
        every=20,  # steps between log lines
        tensorboard=True,  # write event files to tensorboard/ in the workdir
        # Weights & Biases: "offline" (in the workdir, for `wandb sync`) or "online"; "" = off. Needs extra "tracking".
        wandb="",
        # MLflow: "offline" (in the workdir) or "online" (the server at MLFLOW_TRACKING_URI); "" = off. Likewise.
        mlflow="",
    )
    config.evaluate = dict(
        batch_size=0,  # images per call; 0 = chosen for the devices
        bootstrap=1000,  # bootstrap resamples of the patients for the intervals
        flip=False,  # average the predictions for each frame and its mirror image
    )
    VARIANTS[variant](config)
    return config


def folder(config: ml_collections.ConfigDict) -> None:
    """Any labelled shards: nothing to change."""


def busbra(config: ml_collections.ConfigDict) -> None:
    """BUS-BRA (Gomez-Flores et al. 2024)."""
    config.data.path = "data/bus_bra"
    config.positive = "malignant"


def mmotu(config: ml_collections.ConfigDict) -> None:
    """MMOTU-2D (Zhao et al. 2022): the rare classes have fifty images."""
    config.data.path = "data/mmotu_2d"
    config.stop.metric = "f1_macro"


def gist514(config: ml_collections.ConfigDict) -> None:
    """GIST514-DB (He et al. 2023)."""
    config.data.path = "data/gist514_db"
    config.positive = "GIST"


def _mae(config: ml_collections.ConfigDict) -> None:
    """He et al. (2022) for ViT-B, with their rate per 256 images; a batch of 1,024 is too large for such small sets."""
    config.augment.update(crop_scale=(0.08, 1.0), rotation=(0.0, 0.0), interpolation="cubic")
    config.augment.update(brightness=(0.0, 0.0), contrast=(1.0, 1.0), gamma=(1.0, 1.0))
    config.augment.randaugment_magnitude = 9.0
    config.regularization.update(mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.25)
    config.optimizer.update(
        learning_rate=5e-4, floor=1e-6, warmup=0.05, weight_decay=0.05, clip_norm=0.0, layer_decay=0.65
    )
    config.train.update(batch_size=64, epochs=100.0, min_steps=0)


def folder_mae(config: ml_collections.ConfigDict) -> None:
    """Any labelled shards, with MAE's recipe."""
    _mae(config)


def busbra_mae(config: ml_collections.ConfigDict) -> None:
    """BUS-BRA with MAE's recipe."""
    busbra(config)
    _mae(config)


def mmotu_mae(config: ml_collections.ConfigDict) -> None:
    """MMOTU-2D with MAE's recipe."""
    mmotu(config)
    _mae(config)


def gist514_mae(config: ml_collections.ConfigDict) -> None:
    """GIST514-DB with MAE's recipe."""
    gist514(config)
    _mae(config)


def _table(config: ml_collections.ConfigDict, task: str) -> None:
    config.task = task
    config.targets = ""  # CSV files, separated by commas; their column frame, source or file identifies the frames
    config.target = ""  # names of the columns to learn, separated by commas; "" = all suitable ones
    config.regularization.smoothing = 0.0


def folder_multilabel(config: ml_collections.ConfigDict) -> None:
    """Any shards with a table of labels; without `config.target` all of its columns of 0 and 1 are learnt."""
    _table(config, "multilabel")


def folder_regression(config: ml_collections.ConfigDict) -> None:
    """Any shards with a table of numbers. Frames are neither cropped nor stretched, since a number may be a size."""
    _table(config, "regression")
    config.loss = "smooth_l1"  # "smooth_l1" or "mse"
    config.of_frame = False  # True for a length in mm: learnt as a fraction of the frame's side; needs pixel sizes
    config.augment.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    config.stop.metric = "mae"


def hc18(config: ml_collections.ConfigDict) -> None:
    """HC18 (van den Heuvel et al. 2018): only its training part has a table of circumferences."""
    folder_regression(config)
    config.data.update(path="data/hc", split="train")
    config.targets = "raw/hc/training_set_pixel_size_and_HC.csv"
    config.target = "head circumference"
    config.of_frame = True


_PLAIN = (folder, busbra, mmotu, gist514, folder_regression, folder_multilabel, hc18)
VARIANTS = {f.__name__: f for f in (*_PLAIN, folder_mae, busbra_mae, mmotu_mae, gist514_mae)}
