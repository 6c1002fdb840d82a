"""ViT-B/16 masked autoencoder on ultrasound frames (USF-MAE, with our corrections).

python -m usfmae_jax.main --config=configs/pretrain.py --config.data.path='data/openus46/*'
"""

import ml_collections

VARIANTS = ("base", "paper", "demo", "tiny", "small", "large", "huge")


def get_config(variant: str = "base") -> ml_collections.ConfigDict:
    """The run's settings; every field can be overridden with `--config.field=value`."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.init = ""  # an encoder directory to start from; "" starts from random weights
    config.model = dict(
        image_size=224,
        patch_size=16,
        channels=3,
        mean=(0.485, 0.456, 0.406),  # ImageNet's, which the published MAE weights expect
        std=(0.229, 0.224, 0.225),
        width=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        decoder_width=512,
        decoder_depth=8,
        decoder_num_heads=16,
        dtype="bfloat16",  # of the arithmetic; parameters, norms, softmax and loss stay float32
        attention="",  # "xla", "cudnn", or "" for JAX's own choice
        scan=True,  # compile one block and loop over it
        remat=False,  # recompute activations: a third more arithmetic for far less memory
    )
    config.mask = dict(ratio=0.75, fan_aware=False)
    config.loss = dict(normalize_targets=True)
    config.data = dict(
        path="",  # shards: a folder, a glob, gs://...; several separated by commas
        split="train",
        weights=(),  # of several sources; () = by size
        channels=1,  # decoded as grey and repeated on the device; 3 for Doppler
        max_damaged=0.01,  # share of records that may be unreadable
        workers=8,  # processes that decode; 0 = threads
        threads=2,
    )
    config.augment = dict(
        crop_scale=(0.2, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        rotation=(0.0, 0.0),
        hflip=0.5,
        vflip=0.0,
        interpolation="linear",
    )
    config.optimizer = dict(
        learning_rate=1.5e-4,  # per 256 images
        floor=0.0,
        warmup=0.05,  # share of all steps
        weight_decay=0.05,
        decay_all=False,
        b1=0.9,
        b2=0.95,
        clip_norm=0.0,
        layer_decay=1.0,
    )
    config.train = dict(batch_size=1024, accumulate=1, epochs=100, steps=0)  # steps > 0 overrules epochs
    config.mesh = dict(data=-1, fsdp=1)
    config.checkpoint = dict(every=1000, keep=dict(keep_latest=2, keep_every=0, keep_best=1))
    config.log = dict(every=50, pictures_every=1000)
    config.probe = dict(data=dict(path="", split=""), every=1000, limit=4000)
    if variant == "demo":
        config.model.update(
            image_size=96,
            patch_size=8,
            channels=1,
            mean=(0.2,),
            std=(0.2,),
            width=192,
            depth=6,
            num_heads=3,
            decoder_width=128,
            decoder_depth=2,
            decoder_num_heads=4,
            dtype="float32",
        )
        config.data.update(path="data/demo", workers=0)
        config.train.update(batch_size=64, steps=300)
        config.checkpoint.every = 100
        config.log.update(every=10, pictures_every=100)
        config.probe.every = 100
    return config
