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
2,000 images and a small model on a CPU; they were tuned on no dataset.

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
    config.seed = 0  # of the splits, and added to those below
    config.seeds = (0,)  # of initial weights, data order and label fractions: one member each
    # "usfmae-tiny", which is included; a workdir, an encoder or classifier directory, a ResNet-50 weights file;
    config.init = ""  # "" = random weights
    config.classes = ()  # expected names, in order; () = what the shards have
    config.positive = ""  # the positive one of two classes; "" = the last
    config.model = dict(
        arch="",  # tiny, small, base, large, huge, resnet50; "" = as config.init has it, else tiny
        # () and 0, here and below: as config.init or arch has it.
        image_size=(),  # height, width; may differ from config.init's, whose position table is then interpolated
        channels=0,  # of the model's input
        patch_size=0,  # side of a patch in pixels
        width=0,  # of a token; of a ResNet: channels of the stem
        depth=0,  # blocks; of a ResNet: blocks in each of its four stages
        num_heads=0,  # of the attention
        mean=(),  # of the model's input, per channel; pixels are in [0, 1] before
        std=(),  # likewise
        pool="mean",  # of the patch tokens; or "cls", the class token
        drop_path=0.1,  # probability that the last block is passed over; less, in proportion, in those before it
        dtype="float32",  # of the arithmetic; bfloat16 for a GPU or TPU
        attention="",  # "xla", "cudnn", or "" for JAX's own choice
        scan=False,  # True compiles one block and loops over it: quicker to compile, slower on a CPU
        remat="none",  # what the backward pass computes again to save memory: "none", "dots" or "full", see pretrain
    )
    # What is trained: full, frozen (the head only), last_k (the last blocks and the head), lora (what is added to the
    # attention's matrices, of a low rank, and the head).
    config.mode = "full"
    config.last_k = 4  # blocks for mode last_k; of a ResNet: stages
    config.lora_rank = 8  # for mode lora
    config.data = dict(
        path="",  # labelled shards: a folder, a glob; several separated by commas
        split="",  # only this TFDS split; "" = all
        channels=1,  # decoded as grey and repeated on the device; 3 for Doppler
        max_damaged=0.01,  # share of records that may be unreadable
        workers=0,  # processes that decode; 0 = threads
        threads=2,  # that decode, in each process
    )
    config.split = dict(
        kind="auto",  # official, shards, group, single; auto = path, else official, else shards, else group
        path="",  # a CSV file, or a folder with some: frame, part and perhaps fold; what a run leaves in splits/
        folds=5,  # for kind group
        validation=0.2,  # share of the training patients, where the split has no validation part
        test=0.2,  # share of the patients, for kind single
        only=(),  # names of folds to run; () = all
        duplicates=True,  # look for the same picture under two patients, and keep it on one side
        copies="drop",  # of tested pictures in other parts: drop; or keep, as a split was published
        no_copies="",  # a CSV file: lines of a run's duplicates.csv that a person found to be other pictures
    )
    config.fractions = (1.0,)  # shares of the training patients to learn from: one member each
    config.augment = dict(
        crop_scale=(0.6, 1.0),  # share of the area; a lesion should stay in view
        crop_ratio=(3 / 4, 4 / 3),  # of a crop's width to its height
        rotation=(-10.0, 10.0),  # degrees
        hflip=0.5,  # probability of a mirrored view
        vflip=0.0,  # probability of an upside-down view; depth is not symmetric
        interpolation="linear",  # or "cubic", "nearest"
        brightness=(-0.1, 0.1),  # gain, share of the grey scale
        contrast=(0.8, 1.25),  # dynamic range
        gamma=(0.8, 1.25),  # grey map
        randaugment_magnitude=0.0,  # mean strength, up to 10; 0 = off
        randaugment_ops=2,  # operations of RandAugment on a view
        trivialaugment=False,  # one of the same operations of any strength, instead
    )
    config.regularization = dict(
        mixup=0.0,  # a of Beta(a, a); 0 = off
        cutmix=0.0,  # likewise
        smoothing=0.1,  # of the labels
        erasing=0.0,  # probability that a rectangle is erased
        class_weights="none",  # in the loss; "balanced" = all classes alike
        balanced_sampling=False,  # show all classes equally often
    )
    config.optimizer = dict(
        learning_rate=4e-3,  # per 256 images; 5e-4 at batch 32
        floor=1e-6,  # learning rate at the end
        warmup=0.1,  # share of all steps
        weight_decay=0.05,  # of matrices only
        b1=0.9,  # of Adam: decay of the gradient's average
        b2=0.999,  # ... and of its square's
        clip_norm=1.0,  # longest gradient; 0 = off
        layer_decay=0.75,  # of a ViT: factor from the rate of a layer to that of the one below it; 1 = off
    )
    config.train = dict(
        batch_size=32,  # images of an update, of all devices together
        accumulate=1,  # micro-batches of an update
        epochs=25.0,  # passes over the training images
        steps=0,  # updates; more than 0 overrules epochs
        min_steps=200,  # updates at least: few images are seen more often
        skip_nonfinite=0,  # steps of a member with a loss or gradient that is not a number that may be skipped
    )
    config.stop = dict(
        metric="auroc",  # of the validation part; the weights that are best by it are tested
        every=1.0,  # epochs between evaluations
        patience=0,  # evaluations without a better one after which a member ends; 0 = off
    )
    # Members trained at a time, on a CPU: 0 = as many as there are cores for, of a small model; 1 = one after another.
    config.parallel = 0
    config.mesh = dict(
        data=-1,  # devices that share the batch; -1 = the rest of the devices
        fsdp=1,  # devices that also split parameters and optimiser between them
    )
    config.checkpoint = dict(
        every=5,  # evaluations between checkpoints
        keep_finished=False,  # also of a finished member, which keeps its classifier/ anyway
        fallback=False,  # resume before a damaged checkpoint
    )
    config.log = dict(
        every=20,  # steps between lines
        tensorboard=True,  # event files in tensorboard/ of the workdir
        # Weights & Biases: "offline" (in the workdir, for `wandb sync`), "online"; "" = off. Needs extra "tracking".
        wandb="",
        # MLflow: "offline" (in the workdir), "online" (the server that MLFLOW_TRACKING_URI names); "" = off. Likewise.
        mlflow="",
    )
    config.evaluate = dict(
        batch_size=0,  # images per call; 0 = what suits the devices
        bootstrap=1000,  # resamples of the patients for the intervals
        flip=False,  # take the mean of what is said of a frame and its mirror
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
    """MMOTU-2D (Zhao et al. 2022): rare classes have fifty images."""
    config.data.path = "data/mmotu_2d"
    config.stop.metric = "f1_macro"


def gist514(config: ml_collections.ConfigDict) -> None:
    """GIST514-DB (He et al. 2023)."""
    config.data.path = "data/gist514_db"
    config.positive = "GIST"


def _mae(config: ml_collections.ConfigDict) -> None:
    """He et al. (2022) for ViT-B; a batch of 1,024 does not suit sets this small, the rate per 256 images stays."""
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
    config.targets = ""  # CSV files, several separated by commas; frame, source or file is the column that joins them
    config.target = ""  # names of the columns to learn, with commas between them; "" = all that can be
    config.regularization.smoothing = 0.0


def folder_multilabel(config: ml_collections.ConfigDict) -> None:
    """Any shards with a table of labels; without `config.target` all of its columns of 0 and 1."""
    _table(config, "multilabel")


def folder_regression(config: ml_collections.ConfigDict) -> None:
    """Any shards with a table of numbers. Nothing is cropped or stretched: a number may be of a size."""
    _table(config, "regression")
    config.loss = "smooth_l1"  # or "mse"
    config.of_frame = False  # True: a length in mm; learnt as a share of the frame's side, for which pixels have a size
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
