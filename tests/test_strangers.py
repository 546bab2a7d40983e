"""Files from strangers, through the scripts: each ends in one line and status 2, runs nothing, and stays small."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

import compare
import eesampler
import fid
import main as main_script
import pack
import sampler
import train

GIB = 2**30
pytestmark = pytest.mark.usefixtures("modest_memory")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


class Call:
    """Whatever call the unpickler is made to do."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def mark(tmp_path):
    """The folder that a trap makes; not there at the end."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "the file's command was run"


# Checkpoints


def with_zip_pickle(content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch file around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def torch_file(content: object, **kwargs: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **kwargs)
    return file.getvalue()


def legacy_tar(content: object) -> bytes:
    """The format before 0.4: a tar of pickles."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:") as archive:
        for name in ("storages", "tensors", "pickle"):
            pickled = pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(pickled)
            archive.addfile(info, io.BytesIO(pickled))
    return file.getvalue()


CHECKPOINTS = {
    "zip": lambda mark: torch_file({"a": Trap(mark)}),
    "legacy": lambda mark: torch_file({"a": Trap(mark)}, _use_new_zipfile_serialization=False),
    "tar": lambda mark: legacy_tar({"a": Trap(mark)}),
    "plain pickle": lambda mark: pickle.dumps({"a": Trap(mark)}),
    "pickle of protocol 4": lambda mark: with_zip_pickle(pickle.dumps({"a": Trap(mark)}, protocol=4)),
    "in a Namespace": lambda mark: torch_file({"args": argparse.Namespace(x=Trap(mark))}),
    "eval": lambda mark: torch_file({"a": Call(eval, f"__import__('os').mkdir({str(mark)!r})")}),
    "a loader within": lambda mark: torch_file({"a": Call(torch.load, str(mark))}),
    "many bytes of one number": lambda mark: torch_file({"a": Call(bytearray, 8 * GIB)}),
    "a tensor of one number": lambda mark: torch_file({"a": Call(torch.FloatTensor, 2 * GIB)}),
    "a tensor that repeats itself": lambda mark: torch_file({"a": torch.zeros(1).expand(2**40)}),
    "lists of lists": lambda mark: torch_file({"format": "duodiff-1", "config": laughs()}),
    "compressed": lambda mark: with_zip_pickle(pickle.dumps({"a": b"0" * 2**24}), zipfile.ZIP_DEFLATED),
    "named otherwise": lambda mark: save({"a": torch.zeros(2)}),
    "nothing": lambda mark: b"",
}


def laughs(depth: int = 40) -> list:
    """2^depth strings, written down in a few bytes."""
    item: list = ["ha", "ha"]
    for _ in range(depth):
        item = [item, item]
    return item


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints(kind, mark, tmp_path, fails):
    (tmp_path / "evil.pth").write_bytes(CHECKPOINTS[kind](mark))
    argv = ["--checkpoint_path", tmp_path / "evil.pth", "--output_folder", tmp_path / "s", "--device", "cpu"]
    fails(sampler.main, argv, "evil.pth")
    fails(eesampler.main, [*argv, "--threshold", "0.1"], "evil.pth")
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_checkpoints_of_other_readers(mark, tmp_path, fails):
    """The autoencoder, the backbone of early-exit heads, the run to go on from, Inception's weights."""
    evil = tmp_path / "evil.pth"
    torch.save({"a": Trap(mark)}, evil)
    argv = ["--dataset", "digits", "--n_steps", "1", "--log_path", tmp_path / "logs", "--device", "cpu"]
    tiny = ["--img_size", 8, "--patch_size", 4, "--in_chans", 1]
    fails(train.main, [*argv, *tiny, "--load_checkpoint_path", evil], "evil.pth")
    heads = ["--model", "deediff_uvit", "--classifier_type", "attention_probe", "--load_backbone", evil]
    fails(main_script.main, [*argv, *tiny, *heads], "evil.pth")
    Image.new("L", (8, 8)).save(tmp_path / "000000.png")
    argv = ["--samples_path", tmp_path, "--reference", tmp_path, "--device", "cpu"]
    fails(fid.main, [*argv, "--feature_extractor_weights", evil], "SHA-256")
    fails(fid.main, [*argv, "--feature_extractor", evil], "TorchScript")
    argv = ["--dataset", "folder", "--data_path", tmp_path, "--img_size", 8, "--autoencoder_checkpoint_path", evil]
    fails(pack.main, argv, "evil.pth")


def test_a_network_of_absurd_size_takes_no_memory(full, tmp_path, fails):
    content = torch.load(full, weights_only=True)
    params = {"img_size": 4096, "patch_size": 1, "embed_dim": 16384, "depth": 99, "num_heads": 2}
    content["config"]["model_params"] |= params
    torch.save(content, tmp_path / "huge.pth")
    argv = ["--output_folder", tmp_path / "s", "--device", "cpu", "--checkpoint_path"]
    fails(sampler.main, [*argv, tmp_path / "huge.pth"], "huge.pth", "weights do not fit")


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


def entry(**changes: object) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}).encode()


HEADERS = {
    "a header of 2^60 bytes": safetensors(b"{}", 2**60),
    "a header of -1 bytes": safetensors(b"{}", 2**64 - 1),
    "a header of 99 MB": safetensors(b"{}", 99_000_000),
    "no header": b"\0\0\0",
    "nested": safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a shape of 2^60": safetensors(entry(shape=[2**60])),
    "a shape that overflows": safetensors(entry(shape=[2**32, 2**32])),
    "a negative shape": safetensors(entry(shape=[-1])),
    "offsets of 2^60": safetensors(entry(shape=[2**58], data_offsets=[0, 2**60])),
    "offsets backwards": safetensors(entry(data_offsets=[4, 0])),
    "no bytes for a tensor": safetensors(entry()),
    "an unknown type": safetensors(entry(dtype="OBJECT")),
    "a list": safetensors(b"[]"),
    "metadata of numbers": safetensors(b'{"__metadata__": {"config": 1}}'),
    "a nested config": save({"a": torch.zeros(1)}, {"config": "[" * 100_000}),
    "a config that is a list": save({"a": torch.zeros(1)}, {"config": "[]"}),
    "a config with much more": save({"a": torch.zeros(1)}, {"config": json.dumps({"x" * 10**6: 1})}),
    "a step that is no number": save({"a": torch.zeros(1)}, {"step": "9" * 10_000}),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_safetensors(kind, tmp_path, fails):
    (tmp_path / "evil.safetensors").write_bytes(HEADERS[kind])
    argv = ["--checkpoint_path", tmp_path / "evil.safetensors", "--output_folder", tmp_path / "s", "--device", "cpu"]
    fails(sampler.main, argv, "evil.safetensors")


# YAML and JSON

DOCUMENTS = {
    "a command": lambda mark: f"model_params: !!python/object/apply:os.mkdir [{mark}]",
    "a module": lambda mark: "model_params: !!python/module:os",
    "a name": lambda mark: "model_params: !!python/name:os.system",
    "an object": lambda mark: f"model_params: !!python/object/new:os.mkdir [{mark}]",
    "a tuple": lambda mark: "model_params: !!python/tuple [1, 2]",
    "aliases of aliases": lambda mark: (
        "l0: &l0 [ha, ha]\n"
        + "".join(f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}]\n" for i in range(1, 50))
        + "model_params: *l49"
    ),
    "merges of merges": lambda mark: (
        "l0: &l0 {a: 1}\n"
        + "".join(f"l{i}: &l{i} {{<<: [*l{i - 1}, *l{i - 1}]}}\n" for i in range(1, 50))
        + "model_params: *l49"
    ),
    "an alias of itself": lambda mark: "model_params: &a {img_size: *a}",
    "nested": lambda mark: "model_params: " + "[" * 100_000,
    "nested maps": lambda mark: "model_params: " + "{a: " * 50_000,
    "a huge number": lambda mark: f"model_params: {{img_size: 0x{'f' * 5000}, patch_size: 4}}",
    "a huge key": lambda mark: f"model_params: {{0x{'f' * 5000}: 4}}",
    "a huge file": lambda mark: "#" * 2**21,
    "a key that is a list": lambda mark: "? [a]\n: 1\nmodel_params: {}",
    "other encodings": lambda mark: "model_params: \udcff",
    "control characters": lambda mark: "model_params: \x00\x07",
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_yaml(kind, mark, full, tmp_path, fails):
    (tmp_path / "evil.yaml").write_text(DOCUMENTS[kind](mark), encoding="utf-8", errors="surrogateescape")
    argv = ["--checkpoint_path", full, "--output_folder", tmp_path / "s", "--config_path", tmp_path / "evil.yaml"]
    fails(sampler.main, argv, "evil.yaml")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"n_samples": ' + "9" * 10_000 + "}", "[]", "\udcff", ""])
def test_reports(text, tmp_path, fails):
    (tmp_path / "report").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "000000.png")
    for name in ("statistics.json", "metrics.json"):
        (tmp_path / "report" / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    fails(fid.main, ["--samples_path", tmp_path, "--reference", tmp_path], "statistics.json")
    fails(compare.main, [f"a={tmp_path}", "--output", tmp_path / "x.png"], "report")


# Arrays


def saved(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{name: np.asarray(array) for name, array in arrays.items()})
    return file.getvalue()


def npz(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(shape: str, content: bytes = b"", descr: str = "'<f8'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


ENTRY = b"PK\x01\x02\x14\x03\x14\0"  # of a zip's directory; what follows says whether it is encrypted
ARRAYS = {
    "pickles": lambda mark: saved(mu=[Trap(mark)], sigma=[Trap(mark)]),
    "one .npy": lambda mark: npy("(1,)", bytes(8)),
    "a pickled .npy": lambda mark: npy("(1,)", pickle.dumps([Trap(mark)]), "'|O'"),
    "a pickle": lambda mark: pickle.dumps(Trap(mark)),
    "600 MB of zeros": lambda mark: npz(mu=npy("(2,)", bytes(16)), sigma=npy(f"({75 * 2**20},)", bytes(600 * 2**20))),
    "a shape of 2^60": lambda mark: npz(mu=npy(f"({2**60},)"), sigma=npy("(1,)", bytes(8))),
    "a shape of 2^33": lambda mark: npz(mu=npy(f"({2**33},)"), sigma=npy("(1,)", bytes(8))),
    "a nested header": lambda mark: npz(mu=npy("(" * 3000), sigma=npy("(1,)")),
    "a call in a header": lambda mark: npz(mu=npy(f"__import__('os').mkdir({str(mark)!r})"), sigma=npy("(1,)")),
    "text": lambda mark: saved(mu=["a"], sigma=[["b"]]),
    "no numbers": lambda mark: saved(mu=[np.nan], sigma=[[1.0]]),
    "nothing": lambda mark: saved(mu=np.zeros(0), sigma=np.zeros((0, 0))),
    "an encrypted member": lambda mark: npz(mu=npy("(1,)")).replace(
        b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0"
    ),
}


@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.slow
def test_statistics(kind, mark, tmp_path, fails):
    Image.new("L", (8, 8)).save(tmp_path / "000000.png")
    (tmp_path / "evil.npz").write_bytes(ARRAYS[kind](mark))
    fails(fid.main, ["--samples_path", tmp_path, "--reference", tmp_path / "evil.npz"], "evil.npz")


PIXELS = npy("(1, 12288)", bytes(12288), "'|u1'")
BATCHES = {
    "pickled labels": lambda mark: npz(data=PIXELS, labels=npy("(1,)", pickle.dumps([Trap(mark)]), "'|O'")),
    "labels of 2^33": lambda mark: npz(data=PIXELS, labels=npy(f"({2**33},)", b"", "'<i8'")),
    "labels of 64 MB": lambda mark: npz(data=PIXELS, labels=npy(f"({2**23},)", bytes(2**26), "'<i8'")),
    "2^33 pixels": lambda mark: npz(data=npy(f"({2**20}, 12288)", b"", "'|u1'"), labels=npy("(1,)", bytes(8), "'<i8'")),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_imagenet_batches(kind, mark, tmp_path, fails):
    content = BATCHES[kind](mark)
    for k in range(1, 11):
        (tmp_path / f"train_data_batch_{k}.npz").write_bytes(content)
    fails(pack.main, ["--dataset=imagenet64", f"--data_path={tmp_path}", "--img_size=64"], "train_data_batch_1.npz")


# Images and the zip archives they come in


def png(width: int, height: int) -> bytes:
    """One grey image of zeros, row by row, so that making it takes no memory."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    row = bytes(width + 1)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%touch ran) (w) file\n%%EOF\n"
SIZE, ABSURD = struct.pack(">II", 1, 1), struct.pack(">II", 2**31 - 1, 2**31 - 1)
IMAGES = {
    "100 megapixels": lambda: png(12_000, 9_000),
    "a header of 2^62 pixels": lambda: png(1, 1).replace(SIZE, ABSURD),
    "PostScript": lambda: POSTSCRIPT,
    "no image": lambda: b"no image",
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images(kind, tmp_path, fails):
    (tmp_path / "000000.png").write_bytes(IMAGES[kind]())
    fails(fid.main, ["--samples_path", tmp_path, "--reference", tmp_path, "--device", "cpu"], "000000.png")
    fails(pack.main, ["--dataset=folder", f"--data_path={tmp_path}", "--img_size=8"], "no readable images")


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def link(name: str, to: str) -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info, to.encode()


ZIPS = {
    "a name that climbs": lambda: zipped(("../000001.jpg", b"x")),
    "a name of Windows": lambda: zipped(("..\\000001.jpg", b"x")),
    "an absolute name": lambda: zipped(("/000001.jpg", b"x")),
    "a link": lambda: zipped(link("000001.jpg", "/etc/passwd")),
    "300 MB of zeros": lambda: zipped(("000001.jpg", bytes(300 * 2**20))),
    "100 megapixels": lambda: zipped(("000001.jpg", png(12_000, 9_000))),
    "PostScript": lambda: zipped(("000001.jpg", POSTSCRIPT)),
    "no zip": lambda: b"PK\x03\x04 no zip",
}


@pytest.mark.parametrize("kind", ZIPS)
def test_zips(kind, tmp_path, fails):
    (tmp_path / "img_align_celeba.zip").write_bytes(ZIPS[kind]())
    argv = ["--dataset=celeba", f"--data_path={tmp_path}", "--img_size=8", "--num_workers=0"]
    fails(pack.main, argv, "img_align_celeba.zip")
    assert {path.name for path in tmp_path.iterdir()} <= {"img_align_celeba.zip", "packed"}
