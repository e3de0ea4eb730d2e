"""Pictures: what is read, what is refused by name, how they are stored, and what the model sees."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import every_task
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import with_overrides

from gradsmith.data.example import Dropped, Example, Ledger
from gradsmith.data.image import ImageProcessor, Sight, sight_of
from gradsmith.data.pixels import MOST_PIXELS, Unreadable, as_text, decode, png
from gradsmith.data.prepare import prepare
from gradsmith.data.prepared import PreparedData
from gradsmith.errors import UserError
from gradsmith.recipe import parse_recipe

RED, WHITE = [255, 0, 0], [255, 255, 255]


def file_of(picture: PIL.Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **more)
    return file.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def halves(mode: str = "RGB") -> PIL.Image.Image:
    """4 x 6, red on the left and white on the right."""
    pixels = np.full((4, 6, 3), 255, np.uint8)
    pixels[:, :3] = RED
    return PIL.Image.fromarray(pixels).convert(mode)


def tree(folder: Path, sources: Any, **overrides: Any) -> dict[str, Any]:
    found = every_task.recipes(folder, folder)["image_classification"]
    found["data"]["sources"] = sources
    return with_overrides(found, overrides)


def prepared(folder: Path, sources: Any, **overrides: Any) -> PreparedData:
    return prepare(parse_recipe(tree(folder, sources, **overrides)), log=lambda _: None)


def dropped(data: PreparedData) -> dict[str, int]:
    rows = [row for row in data.manifest["ledger"] if row["what"] == "dropped"]
    return {row["reason"]: row["documents"] for row in rows}


# ------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "GIF"])
def test_formats_without_loss_give_the_pixels(kind: str) -> None:
    more = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(file_of(halves(), kind, **more)), np.asarray(halves()))


def test_a_jpeg_gives_what_pillow_gives() -> None:
    file = file_of(PIL.Image.fromarray(noise(20, 30)), "JPEG")
    assert np.array_equal(decode(file), np.asarray(PIL.Image.open(io.BytesIO(file))))


def test_a_picture_is_turned_as_its_exif_says() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the left edge is the upper one
    found = decode(file_of(halves(), exif=exif))
    assert found.shape == (6, 4, 3)
    assert found[0].tolist() == [RED] * 4
    assert found[-1].tolist() == [WHITE] * 4


@pytest.mark.parametrize("mode", ["P", "L", "1", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    if mode == "CMYK":
        kind = "JPEG"
    found = decode(file_of(halves(mode), kind))
    expected = np.asarray(halves(mode).convert("RGB"))
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= (0 if kind == "PNG" else 60)
    assert (found[:, 5] > 250).all()


def test_what_is_transparent_is_white() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = [255, 0, 0, 255]
    pixels[0, 1] = [0, 0, 0, 128]
    found = decode(file_of(PIL.Image.fromarray(pixels)))
    assert found[0, 0].tolist() == RED
    assert abs(int(found[0, 1, 0]) - 127) <= 1
    assert found[1].tolist() == [WHITE, WHITE]
    palette = halves("P")
    index = palette.getpixel((0, 0))
    assert decode(file_of(palette, transparency=index))[0, 0].tolist() == WHITE


def test_of_sixteen_bits_the_upper_eight_count() -> None:
    grey = PIL.Image.fromarray(np.array([[0, 0x1234, 0xFFFF]], np.uint16))
    assert decode(file_of(grey))[0].tolist() == [[0] * 3, [0x12] * 3, [255] * 3]


def test_of_an_animation_the_first_frame_counts() -> None:
    other = PIL.Image.new("RGB", (6, 4), "blue")
    for kind in ("GIF", "WEBP", "PNG"):
        more = {"lossless": True} if kind == "WEBP" else {}
        file = file_of(halves(), kind, save_all=True, append_images=[other], **more)
        assert np.array_equal(decode(file), np.asarray(halves())), kind


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_file_that_is_cut_off_anywhere_is_refused(kind: str) -> None:
    file = file_of(PIL.Image.fromarray(noise(40, 40)), kind)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(Unreadable):
            decode(file[: int(len(file) * share)])


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (b"", "empty"),
        (b"not a picture at all", "not a picture in PNG"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "not a picture|damaged"),
        (file_of(halves(), "TIFF"), "not a picture in PNG"),
    ],
)
def test_what_is_no_picture_is_refused(file: bytes, said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        decode(file)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    edge = int(MOST_PIXELS**0.5) + 100
    file = file_of(PIL.Image.new("1", (edge, edge)))
    assert len(file) < 50_000
    with pytest.raises(Unreadable, match="more than 100,000,000 pixels"):
        decode(file)


def test_a_picture_out_of_proportion_is_refused() -> None:
    with pytest.raises(Unreadable, match="300 x 1"):
        decode(file_of(PIL.Image.new("L", (300, 1))))
    with pytest.raises(Unreadable, match=r"or data\.image\.size"):
        decode(file_of(PIL.Image.new("L", (1700, 1600))), smallest=8)


def test_pixels_are_enlarged_by_whole_factors() -> None:
    found = decode(png(np.asarray(halves()), at_least=10))
    assert found.shape == (8, 12, 3)
    assert np.array_equal(found[::2, ::2], np.asarray(halves()))


# -------------------------------------------------------------------------------------- sources


def test_a_folder_of_each_class_in_folders(tmp_path: Path) -> None:
    every_task.write_pictures(tmp_path / "photos" / "all", 12)
    (tmp_path / "photos" / "all" / "left" / "notes.txt").write_text("no picture")
    (tmp_path / "photos" / "all" / "left" / "UPPER.PNG").write_bytes(file_of(halves()))
    data = prepared(tmp_path, [{"kind": "image_folder", "path": str(tmp_path / "photos")}])
    assert list(data.manifest["classes"]) == ["above", "left"]
    assert sum(entry["documents"] for entry in data.manifest["splits"].values()) == 25


def test_a_picture_outside_of_a_class_is_refused(tmp_path: Path) -> None:
    every_task.write_pictures(tmp_path / "photos", 2)
    (tmp_path / "photos" / "stray.png").write_bytes(file_of(halves()))
    with pytest.raises(UserError, match=r"stray\.png lies in no class's folder"):
        prepared(tmp_path, [{"kind": "image_folder", "path": str(tmp_path / "photos")}])


def test_what_cannot_be_decoded_is_listed_or_refused(tmp_path: Path) -> None:
    every_task.write_pictures(tmp_path / "photos", 20)
    whole = (tmp_path / "photos" / "above" / "1.jpg").read_bytes()
    (tmp_path / "photos" / "above" / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    only = tmp_path / "photos" / "only"
    only.mkdir()
    (only / "one.png").write_bytes(b"nothing")  # a class of which nothing is left
    sources = [{"kind": "image_folder", "path": str(tmp_path / "photos")}]
    data = prepared(tmp_path, sources, output=str(tmp_path / "dropped"))
    reasons = dropped(data)
    assert any("damaged" in reason and "torn.jpg" in reason for reason in reasons)
    assert any("not a picture" in reason and "one.png" in reason for reason in reasons)
    assert list(data.manifest["classes"]) == ["above", "left"]
    assert sum(data.manifest["classes"].values()) == data.manifest["splits"]["train"]["documents"]
    refuse = {"output": str(tmp_path / "refused"), "data.image.on_error": "refuse"}
    with pytest.raises(UserError, match=r"(torn\.jpg: damaged|one\.png: not a picture)"):
        prepared(tmp_path, sources, **refuse)


def test_a_folder_without_one_good_picture_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "1.png").write_bytes(name.encode())
    sources = [{"kind": "image_folder", "path": str(tmp_path / "photos")}]
    everything = {"data.split": {"validation": 0, "test": 0}}
    with pytest.raises(UserError, match=r"not one picture can be decoded; .*1\.png: not a picture"):
        prepared(tmp_path, sources, **everything)


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **more: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in more.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def pictures(count: int) -> list[bytes]:
    return [file_of(PIL.Image.fromarray(noise(9, 9, seed))) for seed in range(count)]


def test_a_tar_is_read_without_unpacking_it(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for number, file in enumerate(pictures(30)):
            add(archive, f"set/train/{'ab'[number % 2]}/{number}.png", file)
        add(archive, "../a/escape.png", file)
        add(archive, "/etc/a/absolute.png", file)
        add(archive, "set/train/a/link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "set/train/a/hard.png", type=tarfile.LNKTYPE, linkname="set/train/a/0.png")
        add(archive, "set/train/a/fifo.png", type=tarfile.FIFOTYPE)
        add(archive, "set/README.md", b"hello")
    data = prepared(tmp_path, [{"kind": "tar", "path": str(tmp_path / "photos.tar")}])
    assert list(data.manifest["classes"]) == ["a", "b"]
    assert sum(entry["documents"] for entry in data.manifest["splits"].values()) == 30
    found = dropped(data)
    assert found["in the tar: a name that leads out of it"] == 2
    assert found["in the tar: a link or a device"] == 3
    assert found["in the tar: no picture by its name"] == 1
    assert not (tmp_path.parent / "a").exists()


def test_webdataset_tars(tmp_path: Path) -> None:
    """Classes before or behind their pictures, over several shards, of which one is gzipped."""
    (tmp_path / "shards").mkdir()
    files = pictures(40)
    for shard, mode in enumerate(("w", "w:gz")):
        ending = "tar" if mode == "w" else "tar.gz"
        with tarfile.open(tmp_path / "shards" / f"{shard}.{ending}", mode) as archive:
            for number in range(20):
                parts = [("png", files[20 * shard + number]), ("cls", b"%d\n" % (number % 3))]
                for ending, part in parts[:: -1 if number % 2 else 1]:
                    add(archive, f"{number:04}.{ending}", part)
    data = prepared(tmp_path, [{"kind": "tar", "path": str(tmp_path / "shards")}])
    assert list(data.manifest["classes"]) == ["0", "1", "2"]
    assert sum(entry["documents"] for entry in data.manifest["splits"].values()) == 40


@pytest.mark.parametrize(
    ("name", "said"),
    [("alone.png", "alone.png: no class"), ("alone.cls", "a class without its picture")],
)
def test_a_tar_with_half_a_sample_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        add(archive, name, file_of(halves()))
    with pytest.raises(UserError, match=said):
        prepared(tmp_path, [{"kind": "tar", "path": str(tmp_path / "t.tar")}])


def test_a_tar_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(UserError, match=r"t\.tar: not readable as tar"):
        prepared(tmp_path, [{"kind": "tar", "path": str(tmp_path / "t.tar")}])


def test_tables_of_pictures(tmp_path: Path) -> None:
    """Bytes in Parquet, and the datasets library's own feature, whose files are not decoded."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    files, labels = pictures(30), [number % 2 for number in range(30)]
    pq.write_table(pa.table({"photo": files, "kind": labels}), tmp_path / "t.parquet")
    source = {"kind": "parquet", "path": str(tmp_path / "t.parquet")}
    columns = {"image": "photo", "label": "kind"}
    table = prepared(tmp_path, [{**source, **columns}], output=str(tmp_path / "table"))
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.Value("int64")})
    rows = {"photo": [{"bytes": file, "path": None} for file in files], "kind": labels}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
    source = {"kind": "hf_dataset", "path": str(tmp_path / "saved")}
    saved = prepared(tmp_path, [{**source, **columns}], output=str(tmp_path / "hub"))
    assert saved.fingerprint != ""
    for name in ("train", "test"):
        one, two = table.split(name), saved.split(name)
        assert np.array_equal(one.file, two.file)
        assert np.array_equal(one.label, two.label)
    bad = pa.table({"photo": ["text"] * 3, "kind": [0, 1, 1]})
    pq.write_table(bad, tmp_path / "bad.parquet")
    source = {"kind": "parquet", "path": str(tmp_path / "bad.parquet")}
    with pytest.raises(UserError, match='"photo", the picture, must be the bytes of a file'):
        prepared(tmp_path, [{**source, **columns}], output=str(tmp_path / "bad"))


def test_equal_files_are_on_one_side(tmp_path: Path) -> None:
    """Whatever their classes; and equal ones of one class count once."""
    every_task.write_pictures(tmp_path / "photos", 20)
    for path in (tmp_path / "photos" / "above").glob("*.png"):
        (tmp_path / "photos" / "left" / f"again-{path.name}").write_bytes(path.read_bytes())
        path.with_name(f"twice-{path.name}").write_bytes(path.read_bytes())
    data = prepared(tmp_path, [{"kind": "image_folder", "path": str(tmp_path / "photos")}])
    assert dropped(data)["exact duplicate"] == 7
    sides: dict[bytes, set[str]] = {}
    for name in ("train", "validation", "test"):
        split = data.split(name)
        for number in range(len(split)):
            sides.setdefault(split.row(number)["file"].tobytes(), set()).add(name)
    assert {len(found) for found in sides.values()} == {1}


# -------------------------------------------------------------------------- what the model sees


def processor(folder: Path, **overrides: Any) -> ImageProcessor:
    recipe = parse_recipe(tree(folder, [{"kind": "digits"}], **overrides))
    return ImageProcessor(sight_of(recipe), {"a": 3, "b": 2}, recipe)


def encoded(one: ImageProcessor, file: bytes, label: str = "a") -> Any:
    (row,) = one.encode([Example("x.png", {"image": as_text(file), "label": label})], Ledger())
    return row


def test_small_pictures_are_stored_as_pixels_and_photographs_as_files(tmp_path: Path) -> None:
    one = processor(tmp_path)
    small, photo = noise(32, 32), PIL.Image.fromarray(noise(20, 20)).resize((320, 240))
    row = encoded(one, file_of(PIL.Image.fromarray(small)))
    assert row["shape"].tolist() == [32, 32]
    assert np.array_equal(row["file"].reshape(32, 32, 3), small)
    file = file_of(photo, "JPEG")
    row = encoded(one, file)
    assert row["shape"].tolist() == [0, 0]
    assert row["file"].tobytes() == file
    assert isinstance(encoded(one, file, "never seen"), Dropped)


def test_photographs_are_decoded_as_they_are_read(tmp_path: Path) -> None:
    """Stored as files; what the batch has is what decoding and the plain chain make of each."""
    files = []
    for name in "ab":
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            picture = PIL.Image.fromarray(noise(12, 16, number)).resize((320, 240))
            files.append(file_of(picture.rotate(ord(name)), "JPEG"))
            (tmp_path / "photos" / name / f"{number}.jpg").write_bytes(files[-1])
    everything = {"data.split": {"validation": 0, "test": 0}}
    sources = [{"kind": "image_folder", "path": str(tmp_path / "photos")}]
    recipe = parse_recipe(tree(tmp_path, sources, **everything))
    data = prepare(recipe, log=lambda _: None)
    split, one = data.split("train"), data.processor(recipe)
    assert not np.asarray(split.shape).any()
    found = one.dataset(split).batch(range(8)).inputs["pixel_values"]
    expected = one.plain([decode(file) for file in files], seed=0)
    assert torch.equal(found, expected)
    draws = np.arange(8, dtype=np.uint64)
    found = one.dataset(split, augment=True).batch(np.arange(8), draws).inputs["pixel_values"]
    assert torch.isfinite(found).all()


def test_what_a_model_was_trained_with_is_taken_over(tmp_path: Path) -> None:
    """From transformers' own configs: cut from the middle, squeezed, and ConvNeXt's share."""
    import transformers

    base = tmp_path / "base"
    cases = [
        (
            transformers.BitImageProcessorPil(
                size={"shortest_edge": 256}, crop_size=224, resample=3, image_mean=[0.1, 0.2, 0.3]
            ),
            Sight(224, 256, (0.1, 0.2, 0.3), (0.26862954, 0.26130258, 0.27577711), "bicubic"),
        ),
        (
            transformers.ViTImageProcessorPil(size={"height": 64, "width": 64}, resample=2),
            Sight(64, None, (0.5,) * 3, (0.5,) * 3, "bilinear"),
        ),
        (
            transformers.ConvNextImageProcessorPil(size={"shortest_edge": 224}, resample=0),
            Sight(224, 256, (0.5,) * 3, (0.5,) * 3, "nearest"),
        ),
    ]
    for theirs, expected in cases:
        theirs.save_pretrained(base)
        found = tree(tmp_path, [{"kind": "digits"}], model={"from": str(base)})
        found["data"]["image"] = {}
        assert sight_of(parse_recipe(found)) == expected
        found["data"]["image"] = {"size": 112, "mean": [0, 0, 0]}
        asked = sight_of(parse_recipe(found))
        assert (asked.size, asked.mean, asked.std) == (112, (0, 0, 0), expected.std)
        assert asked.edge == (expected.edge and 128 * expected.edge // 256)


def test_mixed_pairs_have_shares_of_two_classes(tmp_path: Path) -> None:
    every_task.write_pictures(tmp_path / "photos", 20)
    sources = [{"kind": "image_folder", "path": str(tmp_path / "photos")}]
    data = prepared(tmp_path, sources)
    rows, draws = np.array([0, 30, 1, 29, 2, 28, 3, 27]) % 24, np.arange(8, dtype=np.uint64)
    for mixup, cutmix in ((0.4, 0), (0, 1.0), (0.4, 1.0)):
        objective = {"mixup": mixup, "cutmix": cutmix}
        recipe = parse_recipe(tree(tmp_path, sources, objective=objective))
        one = data.processor(recipe)
        dataset = one.dataset(data.split("train"), augment=True)
        batch, plain = dataset.batch(rows, draws), dataset.batch(rows)
        target = batch.labels["target"]
        torch.testing.assert_close(target.sum(1), torch.ones(8))
        hard = torch.nn.functional.one_hot(plain.labels["target"], 2).float()
        pairs = hard.view(4, 2, 2).sum(1, keepdim=True).expand(4, 2, 2)
        torch.testing.assert_close(target.view(4, 2, 2).sum(1), hard.view(4, 2, 2).sum(1))
        assert (target.view(4, 2, 2)[pairs == 0] == 0).all()
        changed = (batch.inputs["pixel_values"] != plain.inputs["pixel_values"]).flatten(1).any(1)
        assert changed.sum() >= 6
    again = data.processor(parse_recipe(tree(tmp_path, sources, objective={})))
    batch = again.dataset(data.split("train"), augment=True).batch(rows, draws)
    assert batch.labels["target"].dtype == torch.int64
    assert torch.equal(batch.inputs["pixel_values"], plain.inputs["pixel_values"])
