"""Readers of tensors, on files that are right, damaged, lying and evil. What torch itself writes is read in parity/."""

import io
import json
import os
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from unclip_jax.errors import InputError
from unclip_jax.interop import tensors, torch_files

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, -2], ml_dtypes.bfloat16),
    "c": np.array(3, np.int64),
}


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        read = tensor.read()
        assert (tensor.shape, tensor.dtype) == (wanted[name].shape, wanted[name].dtype)
        assert read.dtype == tensor.dtype and np.array_equal(read, wanted[name])
    return True


def test_a_file_and_folders(tmp_path):
    path = tmp_path / "one" / "model.safetensors"
    path.parent.mkdir()
    safetensors.numpy.save_file(ARRAYS, path)
    assert same(tensors.open_tensors(path), ARRAYS) and same(tensors.open_tensors(path.parent), ARRAYS)
    path.rename(path.with_name("decoder.safetensors"))
    assert same(tensors.open_tensors(str(path.parent)), ARRAYS)
    safetensors.numpy.save_file(ARRAYS, path.with_name("prior.safetensors"))
    with pytest.raises(InputError, match="several, decoder.safetensors, prior.safetensors; name the file"):
        tensors.open_tensors(path.parent)
    with pytest.raises(InputError, match="holds none"):
        tensors.open_tensors(tmp_path)
    with pytest.raises(InputError, match="there is no file"):
        tensors.open_tensors(tmp_path / "nothing.safetensors")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(ARRAYS, path)
    found = tensors.open_tensors(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="ends in the middle of"):
        [tensor.read() for tensor in found.values()]


def shards(folder: pathlib.Path, weight_map: dict[str, str]) -> pathlib.Path:
    safetensors.numpy.save_file({"a": ARRAYS["a"]}, folder / "model-1.safetensors")
    safetensors.numpy.save_file({name: ARRAYS[name] for name in "bc"}, folder / "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


MAP = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}


def test_shards(tmp_path):
    assert same(tensors.open_tensors(shards(tmp_path, MAP)), ARRAYS)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"a": "../model-1.safetensors"}, "not one of its own folder"),
        ({"a": "/etc/passwd"}, "not one of its own folder"),
        ({"a": ".."}, "not one of its own folder"),
        ({"a": "model.safetensors.index.json"}, "another index"),
        ({"a": "absent.safetensors"}, "there is no file"),
        ({"d": "model-2.safetensors"}, "disagree on 1 tensors, such as 'd'"),
        ({"a": "model-2.safetensors"}, "disagree on 1 tensors, such as 'a'"),
    ],
)
def test_an_index_that_lies_or_leaves_its_folder(tmp_path, wrong, says):
    with pytest.raises(InputError, match=says):
        tensors.open_tensors(shards(tmp_path, MAP | wrong))


def header(**tensors_):
    text = json.dumps(tensors_).encode()
    return struct.pack("<Q", len(text)) + text


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 4) + b"nope",
        header(a=entry("F32", [4], 0, 16)) + b"\0" * 12,  # cut off
        header(a=entry("F32", [4], 0, 16)) + b"\0" * 20,  # something behind
        header(a=entry("F32", [1 << 40], 0, 16)) + b"\0" * 16,  # another size than its shape
        header(a=entry("F32", [4], 0, 16), b=entry("F32", [4], 8, 24)) + b"\0" * 24,  # overlapping
        header(a=entry("F32", [4], 8, 24)) + b"\0" * 24,  # a gap
        header(a=entry("F32", [4], 16, 0)) + b"\0" * 16,
        header(a=entry("F33", [4], 0, 16)) + b"\0" * 16,
    ],
)
def test_damaged_and_lying_safetensors(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged or no safetensors"):
        tensors.open_tensors(path)


def test_types_that_are_nobodys_weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(header(a=entry("F8_E4M3", [4], 0, 4)) + b"\0" * 4)
    with pytest.raises(InputError, match="a has the type F8_E4M3"):
        tensors.open_tensors(path)


# Archives as torch writes them, by hand: names of torch's functions, without torch.


class Named:
    """Pickles as the name of something that need not exist here, called with arguments."""

    def __init__(self, module, name, *arguments):
        self.module, self.name, self.arguments = module, name, arguments


class Stored:
    """Pickles as a persistent id of so many numbers of a storage."""

    def __init__(self, kind, key, count):
        self.kind, self.key, self.count = kind, key, count


def opcodes(value) -> bytes:
    """The little of the pickle language that is needed here, so that no name has to be importable."""
    if isinstance(value, Named):
        called = b"c" + f"{value.module}\n{value.name}\n".encode()
        return called if value.arguments == (None,) else called + opcodes(value.arguments) + b"R"
    if isinstance(value, Stored):
        kind = Named("torch", value.kind, None)
        return opcodes(("storage", kind, value.key, "cpu", value.count)) + b"Q"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(opcodes, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(opcodes(key) + opcodes(item) for key, item in value.items()) + b"u"
    return pickle.dumps(value, 2)[2:-1]


def archive(path, value, storages=(), *, compressed=False, raw: bytes | None = None, **more: bytes):
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("x/data.pkl", b"\x80\x02" + opcodes(value) + b"." if raw is None else raw)
        for key, data in dict(storages).items():
            out.writestr(f"x/data/{key}", data, kind)
        for name, data in more.items():
            out.writestr(f"x/{name}", data)
    return path


def tensor(kind="FloatStorage", key="0", count=6, offset=0, shape=(2, 3), strides=(3, 1)):
    return Named("torch._utils", "_rebuild_tensor_v2", Stored(kind, key, count), offset, shape, strides, False, {})


SIX = np.arange(6, dtype=np.float32)


def test_views_of_storages(tmp_path):
    value = {
        "a": tensor(),
        "t": tensor(shape=(3, 2), strides=(1, 3)),
        "tail": tensor(offset=4, shape=(2,), strides=(1,)),
        "nested": {"p": Named("torch._utils", "_rebuild_parameter", tensor(), True, {})},
        "none": tensor(shape=(0, 3)),
        "step": 3,
    }
    found = tensors.open_tensors(archive(tmp_path / "x.pt", value, {"0": SIX.tobytes()}))
    grid = SIX.reshape(2, 3)
    wanted = {"a": grid, "t": grid.T, "tail": SIX[4:], "nested.p": grid, "none": np.zeros((0, 3), np.float32)}
    assert same(found, wanted)


def test_only_the_state_dict_of_a_training_checkpoint(tmp_path):
    value = {"epoch": 3, "state_dict": {"w": tensor()}, "optimizer": {"0": tensor()}}
    assert list(tensors.open_tensors(archive(tmp_path / "x.ckpt", value, {"0": SIX.tobytes()}))) == ["w"]


class Touch:
    """What would leave a file behind if anything of it were run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_an_evil_pickle_runs_nothing(tmp_path, protocol):
    left = tmp_path / "left"
    raw = pickle.dumps({"w": Touch(left)}, protocol)
    with pytest.raises(InputError, match="which is no tensor, so it is read no further and nothing of it was run"):
        tensors.open_tensors(archive(tmp_path / "x.pt", None, raw=raw))
    (tmp_path / "old.bin").write_bytes(raw)
    with pytest.raises(InputError, match="no tensor, so it is read no further"):
        tensors.open_tensors(tmp_path / "old.bin")
    assert not left.exists()


@pytest.mark.parametrize(
    "module, name",
    [
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("builtins", "getattr"),
        ("os", "system"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor.__globals__"),
        ("numpy", "load"),
        ("collections", "OrderedDict.fromkeys"),
        ("unclip_jax.interop.torch_files", "os.system"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
    ],
)
def test_no_other_name_is_looked_up(tmp_path, module, name):
    with pytest.raises(InputError, match="which is no tensor"):
        tensors.open_tensors(archive(tmp_path / "x.pt", {"w": Named(module, name, "1 + 1")}))


def test_stand_ins_cannot_be_changed(tmp_path):
    rebuild = opcodes(Named("torch._utils", "_rebuild_tensor_v2", None))
    for state in ({"__call__": 1}, (None, {"_answer": 1})):
        raw = b"\x80\x02" + rebuild + opcodes(state) + b"b."
        with pytest.raises(InputError, match="cannot be changed"):
            tensors.open_tensors(archive(tmp_path / "x.pt", None, raw=raw))


@pytest.mark.parametrize(
    "wrong, says",
    [
        (tensor(shape=(3, 3)), "beyond its storage"),
        (tensor(offset=1), "beyond its storage"),
        (tensor(shape=(1 << 40, 3), strides=(0, 1)), "beyond its storage"),  # one row, a trillion times
        (tensor(offset=-1), "none negative"),
        (tensor(shape=(2, -3)), "none negative"),
        (tensor(strides=(1,)), "as many strides as axes"),
        (tensor(shape=(True, 3)), "whole numbers"),
        (tensor(key="1"), "no storage '1'"),
        (tensor(key="../../x"), "no storage"),
        (tensor(count=1 << 40, shape=(1 << 40,), strides=(1,)), "has 24 bytes, not"),
        (tensor(kind="DoubleStorage"), "has 24 bytes, not 6 numbers of 8"),
        (tensor(kind="OddStorage"), "torch.OddStorage, which is no tensor"),
        (Named("torch._utils", "_rebuild_tensor_v2", 3, 0, (1,), (1,)), "should have a storage"),
    ],
)
def test_tensors_that_lie_about_their_storage(tmp_path, wrong, says):
    with pytest.raises(InputError, match=says):
        tensors.open_tensors(archive(tmp_path / "x.pt", {"w": wrong}, {"0": SIX.tobytes()}))


def test_archives_that_lie(tmp_path):
    with pytest.raises(InputError, match="no storage '0'"):  # compressed: nothing here is ever unpacked
        tensors.open_tensors(archive(tmp_path / "x.pt", {"w": tensor()}, {"0": SIX.tobytes()}, compressed=True))
    with pytest.raises(InputError, match="little end"):
        tensors.open_tensors(archive(tmp_path / "x.pt", {"w": tensor()}, {"0": SIX.tobytes()}, byteorder=b"big"))
    with pytest.raises(InputError, match="holds no tensors"):
        tensors.open_tensors(archive(tmp_path / "x.pt", {"w": 3}))
    whole = archive(tmp_path / "x.pt", {"w": tensor()}, {"0": SIX.tobytes()}).read_bytes()
    for content in (whole[:-30], whole[:60], whole[:4], b"", b"\x80\x02}.", b"hello"):
        (tmp_path / "cut.pt").write_bytes(content)
        with pytest.raises(InputError, match="no file of tensors that can be trusted"):
            tensors.open_tensors(tmp_path / "cut.pt")


def test_two_members_over_the_same_bytes(tmp_path):
    """A directory that lists one storage under many names would make a small file look like a large one."""
    path = archive(tmp_path / "x.pt", {"w": tensor(), "v": tensor(key="1")}, {"0": SIX.tobytes(), "1": SIX.tobytes()})
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    entries = [at for at in range(directory, len(content)) if content[at : at + 4] == b"PK\x01\x02"]
    content[entries[2] + 42 : entries[2] + 46] = content[entries[1] + 42 : entries[1] + 46]
    path.write_bytes(content)
    with pytest.raises(InputError, match="no file of tensors that can be trusted: .*([Oo]verlap|differ)"):
        tensors.open_tensors(path)


def test_a_dictionary_in_itself(tmp_path):
    raw = b"\x80\x02}q\x00(X\x01\x00\x00\x00ah\x00u."
    with pytest.raises(InputError, match="nested too deeply"):
        tensors.open_tensors(archive(tmp_path / "x.pt", None, raw=raw))


def test_a_long_description(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "_LONGEST_PICKLE", 10)
    with pytest.raises(InputError, match="described in far fewer"):
        tensors.open_tensors(archive(tmp_path / "x.pt", {"w": tensor()}, {"0": SIX.tobytes()}))


def test_the_hand_made_archive_is_what_pickle_reads():
    class Names(pickle.Unpickler):
        def find_class(self, module, name):
            return lambda *arguments: (module, name, arguments)

        def persistent_load(self, pid):
            return pid[2:]

    value = Names(io.BytesIO(b"\x80\x02" + opcodes({"w": tensor()}) + b".")).load()
    assert value["w"][:2] == ("torch._utils", "_rebuild_tensor_v2") and value["w"][2][0] == ("0", "cpu", 6)
