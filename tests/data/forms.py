"""The same images as people have them: a folder, a zip, tar shards, parquet, `datasets`."""

import io
import json
import tarfile
import zipfile

import torch

from cmtool.data.drawing import png_bytes

N, SIDE = 12, 8
KINDS = ("cat", "dog", "fox")
NAMES = [f"{KINDS[i * 3 // N]}/{i:03d}.png" for i in range(N)]
LABELS = [i * 3 // N for i in range(N)]


def picture(i, side=SIDE):
    generator = torch.Generator().manual_seed(i)
    return torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator)


PICTURES = torch.stack([picture(i) for i in range(N)])
FILES = dict(zip(NAMES, map(png_bytes, PICTURES), strict=True))


def as_folder(root, files=FILES):
    for name, content in files.items():
        path = root / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root / "folder"


def as_zip(root, files=FILES):
    with zipfile.ZipFile(root / "x.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return root / "x.zip"


def member(archive, name, content=b"", **facts):
    """Add a file to a tar archive, or what `facts` make of it."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in facts.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(content))


def as_tar(root, files=FILES, name="x.tar", how=tarfile.GNU_FORMAT):
    """One archive, as `tar -cf x.tar -C folder .` makes it: in no order."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / name, "w", format=how) as archive:
        member(archive, "./", type=tarfile.DIRTYPE)
        for file, content in reversed(files.items()):
            member(archive, f"./{file}", content)
    return root / name


def as_shards(root, files=FILES):
    """Shards of WebDataset in a folder, the images dealt out to them."""
    for number in range(3):
        part = dict(list(files.items())[number::3])
        as_tar(root, part, f"shards/{number:06d}.tar", tarfile.PAX_FORMAT)
    return root / "shards"


def table(files=FILES, labels=LABELS, names=KINDS):
    """A table of images and classes with the features that `datasets` writes."""
    import pyarrow

    images = [{"bytes": content, "path": name} for name, content in files.items()]
    features = {"label": {"names": list(names), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    columns = {"image": pyarrow.array(images), "label": pyarrow.array(labels, pyarrow.int64())}
    return pyarrow.table(columns).replace_schema_metadata(about)


def as_parquet(root, *, rows=None, split="train", **options):
    """Two files of parquet, in groups of few rows."""
    from pyarrow import parquet

    rows, options = table() if rows is None else rows, {"row_group_size": 4, **options}
    folder = root / "parquet" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    half = len(rows) // 2
    for number, part in enumerate((rows.slice(0, half), rows.slice(half))):
        parquet.write_table(part, folder / f"{split}-{number:05d}-of-00002.parquet", **options)
    return root / "parquet"


def as_saved(root, rows=None, name="saved"):
    """A folder as `datasets.save_to_disk` writes it."""
    from pyarrow import OSFile, ipc

    rows, folder = table() if rows is None else rows, root / name
    folder.mkdir(parents=True)
    with (
        OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        ipc.new_stream(file, rows.schema) as stream,
    ):
        stream.write_table(rows, max_chunksize=5)
    (folder / "state.json").write_text("{}")
    (folder / "dataset_info.json").write_text("{}")
    return folder


FORMS = {
    "folder": as_folder, "zip": as_zip, "tar": as_tar, "shards": as_shards,
    "parquet": as_parquet, "saved": as_saved,
}  # fmt: skip
