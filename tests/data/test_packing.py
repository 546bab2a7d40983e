from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarking.packing import resident_bytes
from common.errors import InputError
from data import open_dataset
from data.files import ImageFiles
from data.packing import work as packing
from data.packing.packed import PackedDataset
from data.packing.work import pack
from data.rows import RowsFile
from pack import main

ROOT = Path(__file__).resolve().parents[2]


def folder(path, num_classes=-1, img_size=16, **kwargs):
    return open_dataset("folder", path, img_size=img_size, in_chans=3, num_classes=num_classes, **kwargs, packed=False)


def all_of(dataset):
    images, labels = dataset.__getitems__(range(len(dataset)))
    return images, labels.tolist()


@pytest.fixture
def pictures(tmp_path, picture_of):
    """150 pictures, more than a chunk; half in a, half in b."""
    path = tmp_path / "pictures"
    for i in range(150):
        (path / "ab"[i // 75]).mkdir(parents=True, exist_ok=True)
        picture_of((20, 24), i).save(path / "ab"[i // 75] / f"{i:03d}.png")
    return path


@pytest.fixture
def packed(pictures, tmp_path):
    """They, packed with labels."""
    pack(folder(pictures, 2), tmp_path / "packed_pictures")
    return tmp_path / "packed_pictures"


def check_packed(name, path, **shape):
    """Packing changes nothing but the place that pixels and labels come from."""
    unpacked = open_dataset(name, path, **shape)
    assert not isinstance(unpacked, PackedDataset)
    flags = [f"--{key}={value}" for key, value in shape.items() if value is not None]
    main([f"--dataset={name}", f"--data_path={path}", *flags, "--num_workers=0", "--quiet"])
    dataset = open_dataset(name, path, **shape)
    assert isinstance(dataset, PackedDataset)
    assert torch.equal(all_of(dataset)[0], all_of(unpacked)[0]) and all_of(dataset)[1] == all_of(unpacked)[1]
    assert dataset.describe() == unpacked.describe() and dataset.random_flip == unpacked.random_flip
    return dataset


@pytest.mark.parametrize("crop", ["center178", "uvit128"])
def test_celeba(crop, celeba_folder, capsys):
    dataset = check_packed("celeba", celeba_folder.parent, img_size=64, in_chans=3, crop=crop)
    assert dataset.labels is None
    assert f"3 images -> {celeba_folder.parent}/packed/celeba_64_{crop} " in capsys.readouterr().out


def test_cifar10(cifar10, make_cifar10_archive, tmp_path):
    """Labels come along, so that one packed dataset serves with classes and without."""
    make_cifar10_archive(tmp_path / "cifar-10-python.tar.gz")
    check_packed("cifar10", tmp_path, img_size=32, in_chans=3)
    dataset = open_dataset("cifar10", tmp_path, img_size=32, in_chans=3, num_classes=10)
    assert isinstance(dataset, PackedDataset) and all_of(dataset)[1] == cifar10[2]
    with pytest.raises(InputError, match="num_classes=5"):
        open_dataset("cifar10", tmp_path, img_size=32, in_chans=3, num_classes=5)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist(name, idx_files, tmp_path):
    """Both mirror as they do unpacked."""
    for file, content in idx_files.items():
        (tmp_path / file).write_bytes(content)
    check_packed(name, tmp_path, img_size=28, in_chans=1)


@pytest.mark.parametrize("name, img_size", [("imagenet64", 64), ("imagenet256", 48)])
def test_imagenet(name, img_size, synset_folders):
    path = synset_folders.parent.parent
    dataset = check_packed(name, path, img_size=img_size, in_chans=3, num_classes=1000)
    assert sorted(set(dataset.labels)) == [0, 1, 999]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_downsampled_imagenet(save, tmp_path):
    for k in range(10):
        data = np.random.default_rng(k).integers(0, 256, (9, 12288), dtype=np.uint8)
        save(tmp_path / f"train_data_batch_{k + 1}.npz", data=data, labels=np.arange(1, 10) + k)
    check_packed("imagenet64", tmp_path, img_size=64, in_chans=3, num_classes=1000)
    # An earlier version packed the numbers of the devkit.
    (manifest,) = tmp_path.glob("packed/*/manifest.json")
    content = json.loads(manifest.read_text())
    assert content["source"].pop("labels") == "sorted WordNet ids"
    manifest.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"labels of the devkit of ImageNet.*pack again"):
        open_dataset("imagenet64", tmp_path, img_size=64, in_chans=3, num_classes=1000)
    assert len(open_dataset("imagenet64", tmp_path, img_size=64, in_chans=3)) == 90


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_however_many_processes(num_workers, pictures, packed, tmp_path):
    pack(folder(pictures, 2), tmp_path / "again", num_workers)
    for name in ("images.npy", "labels.npy", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (packed / name).read_bytes()


def test_any_order(pictures, packed):
    images, labels = all_of(folder(pictures, 2))
    dataset = open_dataset("folder", packed, img_size=16, in_chans=3, num_classes=2)
    for indices in ([149, 0, 7, 7, -1], [5], range(3, 9), []):
        got = dataset.__getitems__(indices)
        assert torch.equal(got[0], images[list(indices)])
        assert got[1].tolist() == [labels[i] for i in indices]
    for outside in (150, -151):
        with pytest.raises(IndexError):
            dataset.__getitems__([0, outside])
    assert len(pickle.dumps(dataset)) < 20_000  # no pixels, no open file
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[3][0], images[3])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell")
def test_memory_does_not_grow_with_the_file(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.truncate(2**29)
    rows = RowsFile(tmp_path / "x", 0, (2**17, 2**12))
    order = np.random.default_rng(0).permutation(2**17).reshape(-1, 128)
    before = resident_bytes()
    for batch in order:
        rows.read(batch)
    assert resident_bytes() - before < 2**26


def test_one_file_serves_processes_at_once(pictures, packed):
    """Forked workers share what was opened before; a position they shared would mix up their images."""
    from data.dataset import training_batches

    dataset = open_dataset("folder", packed, img_size=16, in_chans=3, num_classes=2)
    assert len(dataset[0][0])
    here = training_batches(dataset, 7, 0, 0, 0, pin_memory=False)
    there = training_batches(dataset, 7, 0, 0, 2, pin_memory=False)
    for _ in range(60):
        assert torch.equal(next(here)[0], next(there)[0])


def test_broken_images_are_left_out_and_listed(pictures, tmp_path):
    (pictures / "a" / "000.png").write_text("<html>")  # seen when the folder is opened
    for name in ("a/003.png", "b/149.png"):  # seen when the pixels are needed
        content = (pictures / name).read_bytes()
        (pictures / name).write_bytes(content[:300])
    manifest = pack(folder(pictures, 2), tmp_path / "p")
    assert sorted(manifest.left_out) == ["a/000.png", "a/003.png", "b/149.png"]
    dataset = open_dataset("folder", tmp_path / "p", img_size=16, in_chans=3, num_classes=2)
    assert len(dataset) == dataset.describe()["images"] == 147
    whole = [i for i in range(149) if i not in (2, 148)]
    images, labels = folder(pictures, 2).__getitems__(whole)
    assert torch.equal(all_of(dataset)[0], images) and all_of(dataset)[1] == labels.tolist()
    assert sorted(f.name for f in (tmp_path / "p").iterdir()) == ["images.npy", "labels.npy", "manifest.json"]


def test_of_many_broken_images_the_first_few_are_named(pictures, tmp_path, capsys, caplog):
    """One line where the folder is opened and one where it is packed; the manifest names all."""
    names = [str(path.relative_to(pictures)) for path in sorted(pictures.rglob("*.png"))]
    for name in names[:60]:
        (pictures / name).write_text("<html>")  # seen when the folder is opened
    for name in names[60:100]:
        (pictures / name).write_bytes((pictures / name).read_bytes()[:300])  # seen when the pixels are needed
    argv = ["--dataset=folder", f"--data_path={pictures}", "--img_size=16", f"--output={tmp_path / 'p'}", "--quiet"]
    main([*argv, "--num_workers=2"])
    said = capsys.readouterr()
    first = f"60 files left out: {names[0]} (not readable as an image), {names[1]} ("
    assert caplog.text.count("\n") == 1 and first in caplog.text and names[3] not in caplog.text
    lines = said.out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("50 images -> ") and f"100 files left out: {names[0]} (" in lines[1]
    assert "manifest.json" in lines[1] and len(lines[1]) < 400
    assert sorted(json.loads((tmp_path / "p" / "manifest.json").read_text())["left_out"]) == names[:100]


def test_of_many_broken_images_training_names_the_first_few(pictures, caplog):
    names = sorted(path.name for path in pictures.rglob("*.png"))
    for path in pictures.rglob("*.png"):
        if path.name in names[:120]:
            path.write_bytes(path.read_bytes()[:300])
    folder(pictures).__getitems__(range(150))
    lines = caplog.text.splitlines()
    assert len(lines) == 3 + 2  # by name, and at the 10th and the 100th
    assert all(name in line for name, line in zip(names, lines[:3], strict=False))
    assert "skipped 10 files" in lines[3] and "skipped 100 files" in lines[4]


@pytest.fixture
def odd_names(packed, pictures):
    """The pictures, after they were packed, in folders and files of names that are not UTF-8."""
    if sys.platform in ("win32", "darwin"):
        pytest.skip("the system has no such names")
    root = os.fsdecode(os.fsencode(pictures.parent) + b"/\xff")
    pictures.rename(root)
    for name in ("a", "b"):
        (Path(root) / name).rename(Path(root) / os.fsdecode(b"\xe9" + name.encode()))
    for path in list(Path(root).rglob("*.png")):
        path.rename(path.with_name(os.fsdecode(b"\xfe" + path.name.encode())))
    return Path(root)


def test_names_that_are_not_utf8(odd_names, packed, tmp_path, caplog, capsys):
    """They pack as others do, and are shown by their bytes."""
    names = [path.relative_to(odd_names).as_posix() for path in sorted(odd_names.rglob("*.png"))]
    for name, size in ((names[3], 300), (names[5], 5)):  # the pixels, and the header
        (odd_names / name).write_bytes((odd_names / name).read_bytes()[:size])
    argv = ["--dataset=folder", f"--data_path={odd_names}", "--img_size=16", "--num_classes=2", "--num_workers=2"]
    main([*argv, "--quiet", f"--output={tmp_path / 'p'}"])
    assert r"\udce9a/\udcfe003.png (the image is broken" in capsys.readouterr().out
    content = (tmp_path / "p" / "manifest.json").read_bytes().decode("ascii")
    manifest = json.loads(content)
    assert sorted(manifest["left_out"]) == [names[3], names[5]] and manifest["source"]["source"] == str(odd_names)
    dataset = open_dataset("folder", tmp_path / "p", img_size=16, in_chans=3, num_classes=2)
    whole = [i for i in range(150) if i not in (3, 5)]
    assert torch.equal(all_of(dataset)[0], all_of(open_dataset("folder", packed, img_size=16, in_chans=3))[0][whole])

    pack(folder(odd_names, 2), odd_names / "packed" / "folder_16_fit")  # the way there has such a name too
    assert isinstance(open_dataset("folder", odd_names, img_size=16, in_chans=3), PackedDataset)


def test_the_digest_of_names_is_over_their_bytes(pictures):
    """In UTF-8: packed datasets and caches of before stay valid."""
    (pictures / "a" / "000.png").rename(pictures / "a" / "ä 000.png")
    files = sorted(pictures.rglob("*.png"), key=lambda path: path.relative_to(pictures).as_posix())
    about = [(path.relative_to(pictures).as_posix(), path.stat()) for path in files]
    lines = "".join(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n" for name, stat in about)
    assert folder(pictures).describe()["files_sha256"] == hashlib.sha256(lines.encode("utf-8")).hexdigest()


def test_nothing_but_broken_images(pictures, tmp_path):
    for file in pictures.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(InputError, match="no image can be read"):
        pack(folder(pictures), tmp_path / "p")
    assert not list(tmp_path.glob("p.*"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes of a name")
@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "p.partial/plan.json", "p.partial/journal.jsonl"])
def test_a_pipe_in_the_place_of_a_file_is_refused(name, pictures, packed, stop_at, tmp_path):
    stop_at("_decode", 1)
    with pytest.raises(KeyboardInterrupt):
        pack(folder(pictures, 2), tmp_path / "p")
    stop_at()
    path = tmp_path / name if "/" in name else packed / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=f"{name}: is a pipe or device, wanted a file"):
        if "/" in name:
            pack(folder(pictures, 2), tmp_path / "p")
        else:
            open_dataset("folder", packed, img_size=16, in_chans=3, num_classes=2)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes of a name")
def test_a_pipe_among_the_pictures_is_no_picture(pictures):
    os.mkfifo(pictures / "a" / "pipe.png")
    assert list(folder(pictures).left_out) == ["a/pipe.png"]


@pytest.fixture
def many(tmp_path, picture_of):
    """512 pictures that take a while, two of them broken."""
    path = tmp_path / "many"
    path.mkdir()
    for i in range(4):
        picture_of((400, 400), i).save(path / f"{i:03d}.jpg")
    for i in range(4, 512):
        os.link(path / f"{i % 4:03d}.jpg", path / f"{i:03d}.jpg")
    for i in (10, 500):
        (path / f"{i:03d}.jpg").unlink()  # a link
        (path / f"{i:03d}.jpg").write_bytes((path / "000.jpg").read_bytes()[:5000])
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.slow
def test_what_was_killed_goes_on(many, tmp_path, monkeypatch):
    """The result is that of an unbroken run, bit for bit, and what was done is not done again."""
    journal, output = tmp_path / "killed.partial" / "journal.jsonl", tmp_path / "killed"
    flags = ["--dataset", "folder", "--data_path", str(many), "--img_size", "16", "--num_workers", "2"]
    started = subprocess.Popen(
        [sys.executable, "-m", "data.pack", *flags, "--output", str(output)], cwd=ROOT, start_new_session=True
    )
    while not (journal.exists() and journal.read_bytes().count(b"}\n") >= 2):
        assert started.poll() is None
        time.sleep(0.005)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not output.exists()
    for _ in range(500):  # its workers end with it
        try:
            os.killpg(started.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the workers outlive their parent")

    done = journal.read_bytes().count(b"}\n")
    with journal.open("ab") as file:
        file.write(b'{"number": 5, "crc')  # a line that was being written
    decoded, decode = [], ImageFiles.decode

    def counting(self, index):
        decoded.append(index)
        return decode(self, index)

    monkeypatch.setattr(ImageFiles, "decode", counting)
    pack(folder(many), output)
    assert len(decoded) == 512 - 64 * done and 2 <= done < 8
    assert sorted(tmp_path.iterdir()) == [output, many]
    pack(folder(many), tmp_path / "unbroken")
    for name in ("images.npy", "manifest.json"):
        assert (output / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


@pytest.fixture
def stop_at(monkeypatch):
    """Let the n-th call of a function of data.packing.work, and all after it, raise; () takes it back."""

    def stop(name=None, n=0):
        monkeypatch.undo()
        if name is None:
            return
        function, calls = getattr(packing, name), []

        def stopping(*args, **kwargs):
            calls.append(1)
            if len(calls) > n:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        monkeypatch.setattr(packing, name, stopping)

    return stop


@pytest.mark.parametrize("name, n", [("write_json", 0), ("_decode", 1), ("_sha256", 0), ("_settle", 0)])
def test_wherever_it_stops_it_goes_on(name, n, pictures, packed, stop_at, tmp_path):
    stop_at(name, n)
    with pytest.raises(KeyboardInterrupt):
        pack(folder(pictures, 2), tmp_path / "p")
    assert not (tmp_path / "p").exists()
    (tmp_path / "p.partial" / ".manifest.json.q1w2e3r4.json").write_text("{")  # of one that was killed as it wrote
    stop_at()
    pack(folder(pictures, 2), tmp_path / "p")
    for file in ("images.npy", "labels.npy", "manifest.json"):
        assert (tmp_path / "p" / file).read_bytes() == (packed / file).read_bytes()
    assert len(list((tmp_path / "p").iterdir())) == 3


def test_chunks_that_never_reached_the_disk_are_made_again(pictures, packed, stop_at, tmp_path):
    """After a power cut the journal may know more than the disk."""
    stop_at("_sha256")
    with pytest.raises(KeyboardInterrupt):
        pack(folder(pictures, 2), tmp_path / "p")
    stop_at()
    images = np.load(tmp_path / "p.partial" / "images.npy", mmap_mode="r+")
    images[70] = 0
    images.flush()
    pack(folder(pictures, 2), tmp_path / "p")
    assert (tmp_path / "p" / "images.npy").read_bytes() == (packed / "images.npy").read_bytes()


def test_sources_and_transforms_are_not_mixed(pictures, packed, picture_of, stop_at, tmp_path):
    stop_at("_decode", 1)
    with pytest.raises(KeyboardInterrupt):
        pack(folder(pictures, 2), tmp_path / "p")
    stop_at()
    for output in (packed, tmp_path / "p"):  # a finished one and a begun one
        with pytest.raises(InputError, match=r"crop \(fit and halve\)"):
            pack(folder(pictures, 2, crop="halve"), output)
        with pytest.raises(InputError, match=r"img_size \(16 and 8\)"):
            pack(folder(pictures, 2, img_size=8), output)
    picture_of((20, 20), 0).save(pictures / "a" / "new.png")
    for output in (packed, tmp_path / "p"):
        with pytest.raises(InputError, match="files_sha256"):
            pack(folder(pictures, 2), output)


def test_packing_twice_changes_nothing(pictures, packed):
    before = (packed / "images.npy").stat()
    pack(folder(pictures, 2), packed)
    assert (packed / "images.npy").stat() == before


def test_another_folder_is_left_alone(pictures):
    with pytest.raises(InputError, match="is not a packed dataset"):
        pack(folder(pictures), pictures)


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_one_process_at_a_time(pictures, tmp_path):
    lock = (
        "import sys, pathlib; from common.files import lock; held = lock(pathlib.Path(sys.argv[1]), ''); "
        "print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", lock, str(tmp_path / "p.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="another process"):
            pack(folder(pictures), tmp_path / "p")
        other.communicate(b"\n")
    pack(folder(pictures), tmp_path / "p")
    assert not list(tmp_path.glob("p.*"))


def test_who_waited_for_the_lock_finds_it_done(pictures, tmp_path, monkeypatch):
    """What another process finished between the first look and the lock is taken as it is."""
    lock, done = packing.lock, []

    def slow_lock(*args):
        monkeypatch.setattr(packing, "lock", lock)
        done.append(pack(folder(pictures), tmp_path / "p"))
        return lock(*args)

    monkeypatch.setattr(packing, "lock", slow_lock)
    assert pack(folder(pictures), tmp_path / "p") == done[0]
    assert not list(tmp_path.glob("p.*"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not tell what is open")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_file_of_a_folder_that_is_renamed_is_open(num_workers, pictures, tmp_path, monkeypatch):
    """Windows would refuse to rename it, and to replace images.npy where broken images are left out."""
    (pictures / "a" / "003.png").write_bytes((pictures / "a" / "003.png").read_bytes()[:300])
    renamed = []

    def watching(method):
        def move(self, target):
            if self.name in ("compact.npy", "p.partial"):
                opened = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
                assert not [path for path in opened if path.is_relative_to(tmp_path / "p.partial")]
                renamed.append(self.name)
            return method(self, target)

        return move

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, watching(getattr(Path, name)))
    pack(folder(pictures), tmp_path / "p", num_workers)
    assert renamed == ["compact.npy", "p.partial"]


def test_too_little_room(pictures, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(InputError, match=r"115 kB are needed, but only 100 kB are free, 15\.2 kB too few"):
        pack(folder(pictures), tmp_path / "p")
    assert not list(tmp_path.glob("p.*"))


@pytest.mark.parametrize(
    "count, text",
    [
        *((0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (115_200, "115 kB"), (999_999, "1 MB")),
        *((3_087_007_744, "3.09 GB"), (5 * 10**12, "5 TB"), (12_345 * 10**12, "12300 TB")),
    ],
)
def test_bytes_are_told_in_a_fitting_unit(count, text):
    assert packing.in_bytes(count) == text


@pytest.mark.parametrize("function, calls", [("_decode", 2), ("_sha256", 0), ("write_json", 0), ("write_json", 1)])
def test_a_full_disk(function, calls, pictures, packed, tmp_path, monkeypatch, fails):
    """One line says what is kept; with room the same command goes on."""
    working, argv = getattr(packing, function), ["--dataset=folder", f"--data_path={pictures}", "--img_size=16"]
    argv += ["--num_classes=2", f"--output={tmp_path / 'p'}", "--num_workers=0", "--quiet"]

    def filling(*args):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return working(*args)

    monkeypatch.setattr(packing, function, filling)
    fails(main, argv, f"{tmp_path / 'p'}.partial: No space left", "are kept", "then give the same command again")
    monkeypatch.setattr(packing, function, working)
    main(argv)
    for name in ("images.npy", "labels.npy", "manifest.json"):
        assert (tmp_path / "p" / name).read_bytes() == (packed / name).read_bytes()


def edited(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def flip_byte(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda p: flip_byte(p / "images.npy", -1), "changed"),
        (lambda p: flip_byte(p / "images.npy", 70_000), "changed"),
        (lambda p: flip_byte(p / "labels.npy", -8), "changed"),
        (lambda p: (p / "images.npy").write_bytes((p / "images.npy").read_bytes()[:-5]), "cut short"),
        (lambda p: np.save(p / "images.npy", np.zeros((149, 3, 16, 16), np.uint8)), "disagree"),
        (lambda p: np.save(p / "images.npy", np.zeros((150, 3, 16, 16), np.int8)), "disagree"),
        (lambda p: np.save(p / "images.npy", np.array([{}]), allow_pickle=True), "not readable"),
        (lambda p: np.save(p / "labels.npy", np.array([{}]), allow_pickle=True), "not readable"),
        (lambda p: np.save(p / "labels.npy", np.zeros(3, np.int64)), "a label for each"),
        (lambda p: (p / "images.npy").unlink(), "images.npy"),
        (lambda p: (p / "labels.npy").unlink(), "labels.npy"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json: not readable as JSON"),
        (lambda p: (p / "manifest.json").write_text("[]"), "wanted a packed dataset"),
        (lambda p: (p / "manifest.json").write_text('{"format": 1, "kind": "pixels"}'), "shape.* not given"),
        (lambda p: edited(p, format=2), "format 1"),
        (lambda p: edited(p, kind="sounds"), "kind pixels"),
        (lambda p: edited(p, shape=[151, 3, 16, 16]), "disagree"),
        (lambda p: edited(p, shape="all"), "shape"),
        (lambda p: edited(p, more=1), "unknown key more"),
    ],
)
def test_damage_is_refused(damage, said, packed):
    damage(packed)
    with pytest.raises(InputError, match=said):
        open_dataset("folder", packed, img_size=16, in_chans=3, num_classes=2)


def test_used_only_where_it_fits(pictures, caplog):
    """At its default place another one is passed over; given by name it is refused."""
    caplog.set_level(logging.INFO)
    shape = {"img_size": 16, "in_chans": 3}
    main(["--dataset=folder", f"--data_path={pictures}", "--img_size=16", "--quiet"])
    place = pictures / "packed" / "folder_16_fit"
    assert isinstance(open_dataset("folder", pictures, **shape), PackedDataset)
    assert isinstance(open_dataset("folder", place, **shape), PackedDataset)
    assert not isinstance(open_dataset("folder", pictures, **shape, crop="halve"), PackedDataset)
    assert not isinstance(open_dataset("folder", pictures, **shape, num_classes=2), PackedDataset)
    assert "no labels" in caplog.text
    for wanted in ({"crop": "halve"}, {"num_classes": 2}, {"img_size": 8}, {"in_chans": 1}):
        with pytest.raises(InputError, match="does not fit"):
            open_dataset("folder", place, **shape | wanted)
    with pytest.raises(InputError, match=r"dataset \(folder and celeba\)"):
        open_dataset("celeba", place, **shape, crop="center178")

    place.rename(place.with_name("folder_16_halve"))
    assert not isinstance(open_dataset("folder", pictures, **shape, crop="halve"), PackedDataset)
    assert "crop (fit and halve)" in caplog.text


def test_a_run_says_that_it_takes_a_packed_copy(pictures, monkeypatch, capsys):
    main(["--dataset=folder", f"--data_path={pictures}", "--img_size=16", "--quiet"])
    capsys.readouterr()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a script: nothing but Python itself shows notes
    open_dataset("folder", pictures, img_size=16, in_chans=3)
    assert capsys.readouterr().err == f"using the packed dataset {pictures / 'packed' / 'folder_16_fit'}\n"


def test_a_source_that_changed_is_read_again(celeba_folder, picture_of, caplog):
    root = celeba_folder.parent
    main(["--dataset=celeba", f"--data_path={root}", "--img_size=16", "--quiet"])
    shape = {"img_size": 16, "in_chans": 3}
    picture_of((178, 218)).save(celeba_folder / "000003.jpg")
    dataset = open_dataset("celeba", root, **shape)
    assert len(dataset) == 4 and not isinstance(dataset, PackedDataset) and "changed since" in caplog.text
    shutil.rmtree(celeba_folder)  # gone: the packed images are all there is
    assert isinstance(open_dataset("celeba", root, **shape), PackedDataset)


def test_grey_and_colour_lie_side_by_side(pictures):
    for in_chans in (1, 3):
        flags = ["--img_size=16", f"--in_chans={in_chans}", "--quiet"]
        main(["--dataset=folder", f"--data_path={pictures}", *flags])
    for in_chans in (1, 3):
        dataset = open_dataset("folder", pictures, img_size=16, in_chans=in_chans)
        assert isinstance(dataset, PackedDataset) and dataset[0][0].shape == (in_chans, 16, 16)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--dataset", "folder"], "--img_size"),
        (["--dataset", "celeba", "--img_size", "64", "--download"], "cannot be downloaded"),
        (["--dataset", "celeba", "--img_size", "64", "--crop", "halve"], "crop of celeba=halve"),
        (["--dataset", "cifar10", "--img_size", "64"], "32 x 32"),
        (["--dataset", "imagenet64", "--img_size", "64"], "imagenet64 is not in"),
    ],
)
def test_errors_of_the_command(flags, said, fails, tmp_path):
    fails(main, [*flags, "--data_path", tmp_path], said)
    assert not list(tmp_path.iterdir())
