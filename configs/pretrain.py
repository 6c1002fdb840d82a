"""ViT-B/16 masked autoencoder on ultrasound frames: the USF-MAE job, with our corrections.

    python -m usfmae_jax.main --config=pretrain --config.data.path='data/openus46/*'

Hardware: any GPU or TPU with 40 GB (each doubling of config.train.accumulate halves the activations). 360,000 frames x
100 epochs are 2.1e18 FLOP: about 2 hours on one H200 at 30% of its bf16 peak (calculated: neither time nor outcome has
been measured yet). From random weights, give it more epochs (400 to 800, as MAE took on ImageNet).

Variants
  :paper   the settings published with USF-MAE, including their faults; the same arithmetic per image
  :demo    simulated frames (`make pretrain`); two CPU cores: 3 minutes, loss 0.85, probe AUROC 0.54 -> 0.77
  :tiny    a small model for small data; two CPU cores: 25 to 35 minutes. On 2,081 real frames: loss 0.78,
           AUROC for malignancy in BUS-BRA by logistic regression 0.62 -> 0.76 (measured 2026-11-24)
  :small   ViT-S/16    22 M parameters, 0.2 times the arithmetic of B
  :large   ViT-L/16   303 M parameters, 2.1 times
  :huge    ViT-H/14   630 M parameters, 5.0 times; splits its parameters over 8 devices
  :gigantic   ViT-G/14   1.84 billion parameters, 13 times; splits them likewise
  :cross   ViT-B/16 with a decoder that cross-attends to the visible patches only: 0.6 times
  :tiny_cross   :tiny with such a decoder
  :tiny_latent  :tiny, predicting features of its own running average (or of --config.latent.teacher=DIR), not pixels
  :shipped   :tiny, trained longer: the included weights (usfmae_jax/weights/README.md); two CPU cores: 2 to 3 hours
"""

import ml_collections


def get_config(variant: str = "base") -> ml_collections.ConfigDict:
    """The run's settings; every field can be overridden with `--config.field=value`."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # of weights, data order and masks
    config.objective = "mae"  # what is learnt, see usfmae_jax/objectives; or "cross_mae", or "latent"
    # What to start from: "usfmae-tiny", which is included, or an encoder directory; or, decoder included, a workdir or
    # what usfmae_jax.convert wrote;
    config.init = ""  # "" starts from random weights
    config.model = dict(
        image_size=(224, 224),  # height, width; one number on the command line makes a square
        patch_size=16,  # side of a patch in pixels
        channels=3,  # of the model's input
        mean=(0.485, 0.456, 0.406),  # ImageNet's, which the published MAE weights expect
        std=(0.229, 0.224, 0.225),  # likewise; pixels are in [0, 1] before
        width=768,  # of a token in the encoder
        depth=12,  # blocks of the encoder
        num_heads=12,  # of its attention; they divide the width
        mlp_ratio=4.0,  # hidden width of a block's MLP, as a multiple of the width
        decoder_width=512,  # of a token in the decoder
        decoder_depth=8,  # blocks of the decoder
        decoder_num_heads=16,  # of its attention
        dtype="bfloat16",  # of the arithmetic; parameters, norms, softmax and loss stay float32
        attention="",  # "xla", "cudnn", or "" for JAX's own choice
        scan=True,  # compile one block and loop over it
        # What the backward pass computes again to save memory: "none", "dots" (all but products with matrices) or
        remat="dots",  # "full", all: a third more arithmetic
    )
    config.mask = dict(
        ratio=0.75,  # share of the patches that are hidden
        fan_aware=False,  # hide and predict only inside the imaged sector
        block=1,  # hide squares of so many by so many patches
        blur=0.0,  # pixels; the model sees a blurred image and predicts a sharp one
        share=0.5,  # of the hidden patches that a cross decoder predicts in a step
    )
    config.latent = dict(  # of that objective: a teacher's features are predicted
        teacher="ema",  # the average of the model itself, see train.ema; or an encoder to open, which stays as it is
        everywhere=False,  # of the visible patches too
    )
    config.loss = dict(
        normalize_targets=True,  # predict each patch less its mean, over its deviation
    )
    config.data = dict(
        path="",  # shards: a folder, a glob, gs://...; several separated by commas
        split="train",  # only shards of this TFDS split; "" = all
        # Names of evaluation sets: their shards are passed over, also where `path` matches them.
        exclude=("bus_bra", "gist514_db", "mmotu_2d"),
        weights=(),  # of several sources; () = by size
        channels=1,  # decoded as grey and repeated on the device; 3 for Doppler
        max_damaged=0.01,  # share of records that may be unreadable
        workers=8,  # processes that decode; 0 = threads
        threads=2,  # that decode, in each process
    )
    config.augment = dict(
        crop_scale=(0.2, 1.0),  # share of the area
        crop_ratio=(3 / 4, 4 / 3),  # of a crop's width to its height
        rotation=(0.0, 0.0),  # degrees
        hflip=0.5,  # probability of a mirrored view
        vflip=0.0,  # probability of an upside-down view; depth is not symmetric
        interpolation="linear",  # or "cubic", "nearest"
    )
    config.optimizer = dict(
        learning_rate=1.5e-4,  # per 256 images
        floor=0.0,  # learning rate at the end
        warmup=0.05,  # share of all steps
        weight_decay=0.05,  # of AdamW, on matrices
        decay_all=False,  # decay biases, norms and tokens too
        b1=0.9,  # of Adam: decay of the gradient's average
        b2=0.95,  # ... and of its square's
        clip_norm=0.0,  # longest gradient; 0 = off
        layer_decay=1.0,  # factor from the rate of a layer to that of the one below it; 1 = off
        muon=False,  # matrices of the blocks by Muon, at the same rate
    )
    config.train = dict(
        batch_size=1024,  # images of an update, of all devices together
        accumulate=1,  # micro-batches of an update, which is that of the whole batch
        epochs=100,  # passes over the images
        steps=0,  # updates; more than 0 overrules epochs
        skip_nonfinite=0,  # steps with a loss or gradient that is not a number that may be skipped
        ema=0.0,  # decay of an average of the weights, which is then what is probed and exported; 0 = off
    )
    config.mesh = dict(
        data=-1,  # devices that share the batch; -1 = the rest of the devices
        fsdp=1,  # devices that also split parameters and optimiser between them
    )
    config.checkpoint = dict(
        every=1000,  # steps between checkpoints
        keep=dict(
            keep_latest=2,  # how many of the newest to keep
            keep_every=0,  # keep those at multiples of this step for good; 0 = none
            keep_best=1,  # how many of those with the lowest loss to keep
        ),
        fallback=False,  # resume from the newest checkpoint that can be loaded, should later ones be damaged
    )
    config.log = dict(
        every=50,  # steps between lines
        pictures_every=1000,  # steps between reconstructions; 0 = none
        profile=(0, 0),  # first step and number of steps to trace, say (10, 3), into profile/ for ui.perfetto.dev
        tensorboard=True,  # event files in tensorboard/ of the workdir
        # Weights & Biases: "offline" (in the workdir, for `wandb sync`), "online"; "" = off. Needs extra "tracking".
        wandb="",
        # MLflow: "offline" (in the workdir), "online" (the server that MLFLOW_TRACKING_URI names); "" = off. Likewise.
        mlflow="",
    )
    config.probe = dict(  # is it learning?
        data=dict(
            path="",  # labelled shards; "" = no probe
            split="",  # only this TFDS split; "" = all
        ),
        every=1000,  # steps between probes; 0 = none
        limit=4000,  # labelled frames that are used, at most
    )
    VARIANTS[variant](config)
    return config


def base(config: ml_collections.ConfigDict) -> None:
    """ViT-B/16: nothing to change."""


def paper(config: ml_collections.ConfigDict) -> None:
    """USF-MAE as published. Start it from ImageNet MAE weights with --config.init to repeat it."""
    config.train.update(batch_size=64, epochs=100)
    config.optimizer.update(
        learning_rate=6e-4,  # 1.5e-4 at batch 64; the other arm of its grid is 5e-4, here 2e-3
        floor=1e-5,
        warmup=0.1,
        weight_decay=0.01,  # the other arm is 0.05
        decay_all=True,  # a fault: shrinks norms and biases
        b2=0.999,
        clip_norm=1.0,
    )
    config.loss.normalize_targets = False  # a fault: its starting weights were trained with normalised targets
    config.augment.update(
        crop_scale=(0.5, 2.0),  # a fault: above 1 no crop fits, and the whole image is used
        rotation=(0.0, 90.0),
        vflip=0.5,
        interpolation="nearest",  # a fault: breaks up speckle
    )
    # Its text is not settled on the mask ratio: a secondary source says --config.mask.ratio=0.25.


def tiny(config: ml_collections.ConfigDict) -> None:
    """A small model on small grey images, for a CPU."""
    config.model.update(image_size=(96, 96), patch_size=8, channels=1, mean=(0.25,), std=(0.2,), dtype="float32")
    config.model.update(scan=False, remat="none")
    config.model.update(width=192, depth=6, num_heads=3, decoder_width=128, decoder_depth=2, decoder_num_heads=4)
    config.optimizer.learning_rate = 3e-3  # 7.5e-4 at batch 64
    config.train.update(batch_size=64, steps=3000)
    config.data.workers = 0
    config.checkpoint.every = 250
    config.log.update(every=25, pictures_every=500)
    config.probe.update(every=250, limit=2000)


def demo(config: ml_collections.ConfigDict) -> None:
    """Smaller still, on simulated frames."""
    tiny(config)
    config.model.update(image_size=(64, 64), width=128, depth=4, num_heads=2)
    config.model.update(decoder_width=96, decoder_depth=1, decoder_num_heads=2)
    config.optimizer.learning_rate = 4e-3
    config.data.path = "data/demo"
    config.train.steps = 2000
    config.checkpoint.every = 500
    config.log.pictures_every = 500
    config.probe.update(data=dict(path="data/demo", split="test"), every=500, limit=400)


def small(config: ml_collections.ConfigDict) -> None:
    """ViT-S/16."""
    config.model.update(width=384, num_heads=6, decoder_width=256, decoder_depth=4, decoder_num_heads=8)


def large(config: ml_collections.ConfigDict) -> None:
    """ViT-L/16."""
    config.model.update(width=1024, depth=24, num_heads=16)


def huge(config: ml_collections.ConfigDict) -> None:
    """ViT-H/14."""
    config.model.update(patch_size=14, width=1280, depth=32, num_heads=16, remat="full")
    config.mesh.fsdp = 8


def gigantic(config: ml_collections.ConfigDict) -> None:
    """ViT-G/14 (Zhai et al. 2022)."""
    config.model.update(patch_size=14, width=1664, depth=48, num_heads=16, mlp_ratio=8192 / 1664, remat="full")
    config.mesh.fsdp = 8


def cross(config: ml_collections.ConfigDict) -> None:
    """ViT-B/16, CrossMAE (Fu et al. 2024): half of the hidden patches are predicted, from the visible ones alone."""
    config.objective = "cross_mae"


def tiny_cross(config: ml_collections.ConfigDict) -> None:
    """`:tiny` with such a decoder."""
    tiny(config)
    cross(config)


def tiny_latent(config: ml_collections.ConfigDict) -> None:
    """`:tiny` that predicts features instead of pixels (Baevski et al. 2022; Assran et al. 2023)."""
    tiny(config)
    config.objective = "latent"
    config.train.ema = 0.996


def shipped(config: ml_collections.ConfigDict) -> None:
    """`:tiny` for longer, on real and simulated frames: `usfmae-tiny`, the weights that are included."""
    tiny(config)
    config.data.path = "data/shipped/*"
    config.train.steps = 16000
    config.checkpoint.every = 500
    config.log.pictures_every = 2000
    config.probe.update(data=dict(path="data/shipped/phantom", split="test"), every=1000)


VARIANTS = {
    f.__name__: f
    for f in (base, paper, demo, tiny, small, large, huge, gigantic, cross, tiny_cross, tiny_latent, shipped)
}
