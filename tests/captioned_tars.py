"""Pictures and tar shards for tests, written by Pillow and Python's tarfile, which is not what reads them back."""

import io
import tarfile

from PIL import Image


def picture(colour=(9, 8, 7), size=(8, 8), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, members, tar_format=tarfile.PAX_FORMAT):
    """Writes a tar and returns its path; members are (name, bytes) or a TarInfo."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return str(path)
