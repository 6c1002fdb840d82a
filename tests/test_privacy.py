"""No artefact of any door tells who ran it, on which machine, where, or whose pictures it saw."""

import io
import os
import pathlib
import socket
import sys
import zipfile

import cv2
import pytest

from configs import evaluate as evaluate_config
from configs import finetune as finetune_config
from data_prep import build
from tests.helpers import frame, tiny_config
from tests.interop import made
from usfmae_jax import cli, convert, embed, export, predict
from usfmae_jax.finetuning.loop import finetune
from usfmae_jax.pretraining.loop import pretrain
from usfmae_jax.probing.loop import evaluate

USER, HOST, PATIENT = "zqplanteduser", "zqplantedhost", "ZQ-4711-ZEBEDEE"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home of somebody with a name, on a machine with a name."""
    folder = tmp_path_factory.mktemp("homes") / USER
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("USER", "LOGNAME", "USERNAME"):
            patch.setenv(name, USER)
        patch.setenv("HOSTNAME", HOST)
        patch.setenv("HOME", str(folder))
        patch.setattr(socket, "gethostname", lambda: HOST)
        patch.setattr(socket, "getfqdn", lambda *_: HOST)
        patch.chdir(folder)
        yield folder


def _as_typed(module, *arguments):
    """What a report says was typed."""
    sys.argv = ["door", *arguments]
    return cli.command(f"usfmae_jax.{module}")


@pytest.fixture(scope="module")
def artefacts(home):
    """What every door leaves: folder by door."""
    pictures, out = home / "export" / PATIENT, {}
    for number in range(48):
        path = pictures.with_name(f"{PATIENT}-{number // 2}") / f"{'ab'[number // 2 % 2]}" / f"{PATIENT}_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), frame(number, number // 2 % 2))
    (home / "export" / f"{PATIENT}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (home / "salt").write_bytes(bytes(range(32)))
    (home / "salt").chmod(0o600)
    out["build"] = home / "data"
    flags = ["--private", "--whole_frames", f"--salt={home / 'salt'}", "--name=x", "--workers=1"]
    flags += [f"--pattern=(?P<patient>{PATIENT}-[^/]+)/(?P<cls>[^/]+)/", "--deduplicate=off", "--thin=off"]
    flags += ["--format=tfrecord", "--encoding=raw"]  # so that all bytes can be searched
    assert build.main(["--dataset=folder", f"--input={home / 'export'}", f"--output={out['build']}", *flags]) == 0
    shards = str(out["build"] / "x")
    argv = sys.argv
    try:
        out["pretrain"] = home / "runs/pretrain"
        config = tiny_config(shards)
        config.train.steps, config.checkpoint.every, config.log.pictures_every = 2, 1, 1
        config.probe.data.update(path=shards, split="")
        config.probe.every = 2
        assert pretrain(config, str(out["pretrain"]))
        out["finetune"] = home / "runs/finetune"
        config = finetune_config.get_config("folder")
        config.data.path, config.init = shards, str(out["pretrain"])
        config.model.update(image_size=(32, 32))
        config.train.update(batch_size=16, steps=2)
        config.split.update(folds=2, duplicates=False)
        config.log.every, config.evaluate.bootstrap = 1, 20
        assert finetune(config, str(out["finetune"]), _as_typed("finetune", f"--config.init={config.init}"))
        out["evaluate"] = home / "runs/evaluate"
        config = evaluate_config.get_config()
        config.data.path, config.checkpoint, config.cache = shards, str(out["pretrain"]), str(home / "cache")
        config.split.update(folds=2, duplicates=False)
        config.bootstrap = 20
        evaluate(config, str(out["evaluate"]), _as_typed("evaluate", f"--config.checkpoint={config.checkpoint}"))
        out["cache"] = home / "cache"
    finally:
        sys.argv = argv
    out["embed"] = home / "embedded"
    out["embed"].mkdir()
    assert embed.main([f"--checkpoint={out['pretrain']}", f"--data={shards}", f"--output={out['embed']}/x.npz"]) == 0
    out["predict"] = home / "predicted"
    assert predict.main([f"--checkpoint={out['finetune']}", f"--data={shards}", f"--output={out['predict']}"]) == 0
    out["convert"] = home / "converted"
    made.write(home / "weights.safetensors", made.tensors())
    assert convert.main([f"--input={home / 'weights.safetensors'}", f"--output={out['convert']}", *made.HEADS]) == 0
    return out


def _contents(path):
    """Name and bytes of a file, and of what is packed in it."""
    data = path.read_bytes()
    yield path.name, data
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield member, archive.read(member)


def _assert_silent(folder, home):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    secrets = [USER, HOST, PATIENT, "ZEBEDEE", str(home), str(pathlib.Path(__file__).parents[1])]
    for path in files:
        for name, data in _contents(path):
            for secret in secrets:
                for encoding in ("utf-8", "utf-16-le", "utf-32-le"):
                    assert secret.encode(encoding) not in data, f"{secret} in {path} {name}"
                assert secret not in os.path.relpath(path, home), path


@pytest.mark.parametrize("door", ["build", "pretrain", "finetune", "evaluate", "cache", "embed", "predict", "convert"])
def test_no_artefact_of_a_door_tells_who_where_or_whose(artefacts, home, door):
    _assert_silent(artefacts[door], home)


@pytest.mark.parametrize("source", ["pretrain", "finetune"])
@pytest.mark.parametrize("form", ["safetensors", "timm", "hf", "mae", "onnx", "stablehlo"])
def test_no_export_tells_who_where_or_whose(artefacts, home, form, source, capsys):
    checkpoint = artefacts[source]
    if source == "finetune":
        checkpoint = sorted((checkpoint / "members").iterdir())[0]
    output = home / f"exported-{source}-{form}"
    status = export.main([f"--checkpoint={checkpoint}", f"--output={output}", f"--format={form}"])
    if status == 2:
        pytest.skip(capsys.readouterr().err.splitlines()[-1])  # a package is missing, or no place for a head
    _assert_silent(output, home)
