"""ViT-B/16 masked autoencoder on ultrasound frames: the USF-MAE job, with our corrections.

    python -m usfmae_jax.main --config=pretrain --config.data.path='data/openus46/*'

Hardware: 3.5 GiB on each of 8 TPU v5e, 4.2 on each of 8 A100 or H100, 41 on one H200 (from the compilers, see
docs/scale.md); each doubling of config.train.accumulate halves the activations, which are most of it. 360,000 frames x
100 epochs are 2.1e18 FLOP: about 2 hours on one H200 at 30% of its bf16 peak (calculated: neither time nor outcome has
been measured yet). From random weights, give it more epochs (400 to 800, as MAE took on ImageNet).

Variants
  :paper   the settings published with USF-MAE, including their faults; the same arithmetic per image; 4 GiB
  :demo    simulated frames (`make pretrain`); two CPU cores: 3 to 6 minutes, loss 0.85, probe AUROC 0.54 -> 0.77
  :tiny    a small model for small data; two CPU cores: 25 to 35 minutes. On 2,081 real frames: loss 0.78,
           AUROC for malignancy in BUS-BRA by logistic regression 0.62 -> 0.76 (measured 2026-11-24)
  :small   ViT-S/16    22 M parameters, 0.2 times the arithmetic of B; 1.4 GiB on each of 8 v5e
  :large   ViT-L/16   303 M parameters, 2.1 times; 6.1 GiB on each of 16 v5e, 9.6 on each of 8 H100
  :huge    ViT-H/14   630 M parameters, 5.0 times; splits its parameters over 8 devices; 3.1 GiB on each of 16 v5e,
           6.5 on each of 8 H100
  :gigantic   ViT-G/14   1.84 billion parameters, 13 times; splits them likewise; 6.0 GiB on each of 16 v5e
  :cross   ViT-B/16 with a decoder that cross-attends to the visible patches only: 0.6 times; 3.1 GiB on each of 8 v5e
  :tiny_cross   :tiny with such a decoder
  :tiny_latent  :tiny, predicting features of its own running average (or of --config.latent.teacher=DIR), not pixels
  :shipped   the included weights (usfmae_jax/weights/README.md): CrossMAE with Muon; two CPU cores: 1.5 to 2 hours
"""

import ml_collections


def get_config(variant: str = "base") -> ml_collections.ConfigDict:
    """The run's settings; every field can be overridden with `--config.field=value`."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # seed of weights, data order and masks
    config.objective = "mae"  # what is learnt, see usfmae_jax/objectives; or "cross_mae", or "latent"
    # What to start from: "usfmae-tiny", which is included, or an encoder directory; or, with the decoder, a workdir or
    # what usfmae_jax.convert wrote;
    config.init = ""  # "" starts from random weights
    config.model = dict(
        image_size=(224, 224),  # height, width; a single number on the command line means a square
        patch_size=16,  # side of a patch in pixels
        channels=3,  # input channels
        mean=(0.485, 0.456, 0.406),  # ImageNet's, which the published MAE weights expect
        std=(0.229, 0.224, 0.225),  # likewise; both apply to pixels in [0, 1]
        width=768,  # token width of the encoder
        depth=12,  # number of encoder blocks
        num_heads=12,  # attention heads of the encoder; must divide the width
        mlp_ratio=4.0,  # hidden width of each MLP, as a multiple of the width
        decoder_width=512,  # token width of the decoder
        decoder_depth=8,  # number of decoder blocks
        decoder_num_heads=16,  # attention heads of the decoder
        dtype="bfloat16",  # compute dtype; parameters, norms, softmax and loss stay float32
        attention="",  # "xla", "cudnn", or "" for JAX's own choice
        scan=True,  # compile one block and loop over it
        # What the backward pass recomputes to save memory: "none", "dots" (everything except matrix products) or
        remat="dots",  # "full" (everything: a third more arithmetic)
    )
    config.mask = dict(
        ratio=0.75,  # fraction of the patches that are masked
        fan_aware=False,  # mask and predict only patches inside the imaged sector
        block=1,  # side of the masked squares, in patches
        blur=0.0,  # pixels; the model sees a blurred image and predicts the sharp one
        share=0.5,  # fraction of the masked patches that a cross decoder predicts in each step
    )
    config.latent = dict(  # for objective "latent", which predicts a teacher's features
        teacher="ema",  # the moving average of the model, see train.ema; or a fixed encoder to load
        everywhere=False,  # predict the features of the visible patches too
    )
    config.loss = dict(
        normalize_targets=True,  # normalise each target patch to zero mean and unit variance
    )
    config.data = dict(
        path="",  # shards: a folder, a glob, gs://...; separate several with commas
        split="train",  # only shards of this TFDS split; "" = all
        # Names of evaluation sets: their shards are skipped even if `path` matches them.
        exclude=("bus_bra", "gist514_db", "mmotu_2d"),
        weights=(),  # sampling weights of several sources; () = in proportion to their size
        channels=1,  # decoded channels: 1 (grey, repeated on the device for a model with 3) or 3 for Doppler
        max_damaged=0.01,  # maximum fraction of unreadable records
        workers=8,  # decoding processes; 0 = threads only
        threads=2,  # decoding threads in each process
    )
    config.augment = dict(
        crop_scale=(0.2, 1.0),  # fraction of the area
        crop_ratio=(3 / 4, 4 / 3),  # aspect ratio of a crop: width to height
        rotation=(0.0, 0.0),  # rotation in degrees
        hflip=0.5,  # probability of a mirrored view
        vflip=0.0,  # probability of an upside-down view; depth is not symmetric
        interpolation="linear",  # "linear", "cubic" or "nearest"
    )
    config.optimizer = dict(
        learning_rate=1.5e-4,  # peak rate per 256 images
        floor=0.0,  # learning rate at the end
        warmup=0.05,  # fraction of all steps
        weight_decay=0.05,  # of AdamW, applied to matrices only
        decay_all=False,  # apply weight decay to biases, norms and tokens too
        b1=0.9,  # Adam: decay rate of the first moment
        b2=0.95,  # Adam: decay rate of the second moment
        clip_norm=0.0,  # maximum norm of the gradient; 0 = off
        layer_decay=1.0,  # each layer's learning rate is that of the next one times this; 1 = off
        muon=False,  # update the matrices of the blocks with Muon, at the same learning rate
    )
    config.train = dict(
        batch_size=1024,  # images per update, over all devices
        accumulate=1,  # micro-batches per update; the update is that of the whole batch
        epochs=100,  # passes over the images
        steps=0,  # updates; overrides epochs if greater than 0
        skip_nonfinite=0,  # how many steps with a non-finite loss or gradient may be skipped
        ema=0.0,  # decay rate of an average of the weights, which is then probed and exported; 0 = off
    )
    config.mesh = dict(
        data=-1,  # devices that the batch is split over; -1 = all remaining devices
        fsdp=1,  # devices that split the batch and also shard parameters and optimiser state
    )
    config.checkpoint = dict(
        every=1000,  # steps between checkpoints
        keep=dict(
            keep_latest=2,  # how many of the newest checkpoints to keep
            keep_every=0,  # keep every checkpoint at a multiple of this step; 0 = none
            keep_best=1,  # how many of the checkpoints with the lowest loss to keep
        ),
        fallback=False,  # resume from an older checkpoint if the newest is damaged
    )
    config.log = dict(
        every=50,  # steps between log lines
        pictures_every=1000,  # steps between pictures of reconstructions; 0 = none
        profile=(0, 0),  # first step and number of steps to trace, such as (10, 3), into profile/ for ui.perfetto.dev
        tensorboard=True,  # write event files to tensorboard/ in the workdir
        # Weights & Biases: "offline" (in the workdir, for `wandb sync`) or "online"; "" = off. Needs extra "tracking".
        wandb="",
        # MLflow: "offline" (in the workdir) or "online" (the server at MLFLOW_TRACKING_URI); "" = off. Likewise.
        mlflow="",
    )
    config.probe = dict(  # a probe of the encoder during training
        data=dict(
            path="",  # labelled shards; "" = no probe
            split="",  # only this TFDS split; "" = all
        ),
        every=1000,  # steps between probes; 0 = none
        limit=4000,  # maximum number of labelled frames to use
    )
    VARIANTS[variant](config)
    return config


def base(config: ml_collections.ConfigDict) -> None:
    """ViT-B/16: nothing to change."""


def paper(config: ml_collections.ConfigDict) -> None:
    """USF-MAE as published. To reproduce it, start from ImageNet MAE weights with --config.init."""
    config.train.update(batch_size=64, epochs=100)
    config.optimizer.update(
        learning_rate=6e-4,  # 1.5e-4 at batch 64; the other value of its grid is 5e-4, here 2e-3
        floor=1e-5,
        warmup=0.1,
        weight_decay=0.01,  # the other value is 0.05
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
    # The paper is not consistent about the mask ratio: a secondary source gives --config.mask.ratio=0.25.


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
    """Even smaller, on simulated frames."""
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
    """ViT-B/16, CrossMAE (Fu et al. 2024): half of the masked patches are predicted, from the visible ones alone."""
    config.objective = "cross_mae"


def tiny_cross(config: ml_collections.ConfigDict) -> None:
    """`:tiny` with the cross-attention decoder."""
    tiny(config)
    cross(config)


def tiny_latent(config: ml_collections.ConfigDict) -> None:
    """`:tiny`, predicting features instead of pixels (Baevski et al. 2022; Assran et al. 2023)."""
    tiny(config)
    config.objective = "latent"
    config.train.ema = 0.996


def shipped(config: ml_collections.ConfigDict) -> None:
    """The included weights, `usfmae-tiny`: CrossMAE (`:tiny_cross`) on real and simulated frames."""
    tiny_cross(config)  # with Muon, the best at 64 pixels for equal time, see benchmarks/RESULTS.md
    config.optimizer.muon = True
    config.data.path = "data/shipped/*"
    config.train.steps = 10000
    config.checkpoint.every = 500
    config.log.pictures_every = 2000
    config.probe.update(data=dict(path="data/shipped/phantom", split="test"), every=1000)


_SIZES = (base, paper, demo, tiny, small, large, huge, gigantic)
VARIANTS = {f.__name__: f for f in (*_SIZES, cross, tiny_cross, tiny_latent, shipped)}
