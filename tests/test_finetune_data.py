"""The harness's data: sources, classes, splits, processors, augmentation, and each kind of bad input."""

import dataclasses
import itertools
import json
import logging

import pytest

torch = pytest.importorskip("torch")
for extra in ("transformers", "sklearn", "tokenizers", "PIL"):
    pytest.importorskip(extra)

import numpy as np
import PIL.Image
from transformers import AutoTokenizer

from fuseopt.finetune.data import DataOptions, Pixels, SetEpoch, datasets, folds, load, new_processor, shares
from fuseopt.finetune.data.augment import AUGMENTATIONS, augment
from fuseopt.finetune.data.texts import clean

SENTENCES = DataOptions(data="sentences")


def write_npz(folder, name="x.npz", count=12, size=8, channels=(), **arrays):
    images = np.random.default_rng(0).uniform(0, 200, (count, *channels, size, size)).astype(np.float32)
    np.savez(folder / name, **{"images": images, "labels": np.arange(count) % 3, **arrays})
    return str(folder / name)


def write_lines(folder, name, *lines):
    path = folder / name
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return str(path)


def write_csv(folder, *extra, name="x.csv", header="text,label", labels="ab", count=8):
    rows = [f"words number {i},{labels[i % len(labels)]}" for i in range(count)]
    return write_lines(folder, name, header, *rows, *extra)


def write_jsonl(folder, *extra, count=8):
    rows = [json.dumps({"text": f"words number {i}", "label": i % 2}) for i in range(count)]
    return write_lines(folder, "x.jsonl", *rows, *extra)


def write_images(folder, classes=("cat", "dog"), count=4, size=(6, 5), mode="RGB"):
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            PIL.Image.new(mode, size, 40 * number + i).save(folder / name / f"{i}.png")
    return str(folder)


def write_cifar(folder, batches=(1,), count=8, test=True, meta=True, cut=0):
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}.bin" for i in batches] + ["test_batch.bin"] * test:
        records = rng.integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(count) % 2 * 3  # airplane, cat
        content = records.tobytes()
        (folder / name).write_bytes(content[: len(content) - cut])
    if meta:
        names = "airplane automobile bird cat deer dog frog horse ship truck"
        (folder / "batches.meta.txt").write_text("\n".join(names.split()) + "\n\n")
    return str(folder)


def labels(rows):
    return [row["labels"] for row in rows]


# ---- sources


def test_digits():
    data = load(DataOptions(), 0)
    assert (data.kind, data.shape, data.names) == ("image", (1, 8, 8), [str(i) for i in range(10)])
    assert (len(data.train), len(data.test)) == (1347, 450)
    image = data.train[0]["image"]
    assert image.dtype == torch.float32 and image.min() >= 0
    assert max(row["image"].max() for row in data.train) == 1
    assert data.description == "scikit-learn's digits: 10 classes, 1347 training and 450 test 1x8x8 images"


def test_classes_are_picked_by_name_and_numbered_in_their_own_order():
    data = load(DataOptions(classes=["9", 5]), 0)  # YAML reads a number
    assert data.names == ["5", "9"] and set(labels(data.train)) == {0, 1}
    whole = load(DataOptions(), 0)
    count = sum(whole.names[label] in "59" for label in labels(whole.train + whole.test))
    assert len(data.train + data.test) == count


def test_the_split_is_stratified_and_decided_by_the_seed():
    first, again, other = (load(DataOptions(), seed) for seed in (0, 0, 1))
    assert labels(first.test) == labels(again.test) != labels(other.test)
    for data in (first, other):
        part, whole = np.bincount(labels(data.test)), np.bincount(labels(data.train + data.test))
        assert np.abs(part - whole / 4).max() <= 1


def test_sentences_are_many_and_all_different():
    data = load(SENTENCES, 0)
    assert (data.kind, data.shape) == ("text", None)
    assert data.names == ["cooking", "money", "music", "sport", "travel", "weather"]
    words = [frozenset(clean(row["text"]).lower().strip(".").split()) for row in data.train + data.test]
    assert len(words) > 1000
    nearest = max(len(a & b) / len(a | b) for a, b in itertools.combinations(words, 2))
    assert nearest < 0.6  # of the words that either has
    assert not {row["text"] for row in data.train} & {row["text"] for row in data.test}


def test_sentences_can_be_learnt_but_no_word_tells_half_of_a_topic():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    data = load(SENTENCES, 0)
    features = TfidfVectorizer(token_pattern=r"\w+").fit([row["text"] for row in data.train])
    train, test = (features.transform([row["text"] for row in part]) for part in (data.train, data.test))
    score = LogisticRegression(C=10).fit(train, labels(data.train)).score(test, labels(data.test))
    assert 0.85 < score < 0.98
    words = (train > 0).toarray()
    by_class = np.stack([words[np.array(labels(data.train)) == label].mean(0) for label in range(6)])
    telling = by_class.max(0) > 2 * np.sort(by_class, 0)[-2]  # words of one topic; "the" is none of them
    assert by_class[:, telling].max() < 0.5


def test_npz(tmp_path):
    data = load(DataOptions(data=write_npz(tmp_path)), 0)
    assert data.shape == (1, 8, 8) and data.names == ["0", "1", "2"]
    assert max(row["image"].max() for row in data.train + data.test) == 1
    colour = load(DataOptions(data=write_npz(tmp_path, channels=(3,)), image_size=5), 0)
    assert colour.shape == (3, 5, 5)


def test_test_data_is_scaled_as_the_training_file_is(tmp_path):
    images = np.full((6, 4, 4), 50.0)
    train = write_npz(tmp_path, size=4, images=np.full((12, 4, 4), 100.0))
    test = write_npz(tmp_path, "test.npz", count=6, size=4, images=images)
    data = load(DataOptions(data=train, test_data=test), 0)
    assert (len(data.train), len(data.test)) == (12, 6)
    assert data.test[0]["image"].unique().tolist() == [0.5]


@pytest.mark.parametrize("meta", [True, False])
def test_cifar10(tmp_path, meta):
    data = load(DataOptions(data=write_cifar(tmp_path, batches=(1, 3), meta=meta)), 0)
    assert data.shape == (3, 32, 32) and data.names == ["airplane", "cat"]
    assert (len(data.train), len(data.test)) == (16, 8)
    assert "without data_batch_2.bin, data_batch_4.bin, data_batch_5.bin)" in data.description
    record = np.frombuffer((tmp_path / "data_batch_1.bin").read_bytes()[:3073], np.uint8)
    expected = torch.tensor(record[1:].reshape(3, 32, 32) / np.float32(255))
    assert torch.equal(data.train[0]["image"], expected) and labels(data.train)[:2] == [0, 1]


def test_cifar10_without_its_test_batch_is_split(tmp_path):
    data = load(DataOptions(data=write_cifar(tmp_path, test=False)), 0)
    assert (len(data.train), len(data.test)) == (6, 2)
    assert "test_batch.bin" in data.description


def test_image_folder(tmp_path):
    (tmp_path / ".hidden").mkdir()
    data = load(DataOptions(data=write_images(tmp_path)), 0)
    assert data.shape == (3, 5, 6) and data.names == ["cat", "dog"]
    assert (len(data.train), len(data.test)) == (6, 2)
    values = sorted(float(row["image"][0, 0, 0]) for row in data.train + data.test)
    assert values == [float(np.float32(v) / 255) for v in (0, 1, 2, 3, 40, 41, 42, 43)]


@pytest.mark.parametrize("name", ["test", "val"])
def test_image_folder_with_its_own_test_part(tmp_path, name):
    write_images(tmp_path / "train", count=3, mode="L")
    write_images(tmp_path / name, count=2, mode="L")
    data = load(DataOptions(data=str(tmp_path)), 0)
    assert (len(data.train), len(data.test), data.shape) == (6, 4, (1, 5, 6))


def test_gray_and_coloured_images_together_are_coloured(tmp_path):
    write_images(tmp_path, ("a",), mode="L")
    data = load(DataOptions(data=write_images(tmp_path, ("b",))), 0)
    assert data.shape == (3, 5, 6) and {len(row["image"]) for row in data.train + data.test} == {3}


def test_image_size_makes_all_images_one_size(tmp_path):
    write_images(tmp_path, ("a",), size=(9, 7))
    data = load(DataOptions(data=write_images(tmp_path, ("b",)), image_size=4), 0)
    assert {row["image"].shape for row in data.train + data.test} == {(3, 4, 4)}


def test_csv(tmp_path):
    path = write_csv(tmp_path, '"two\nlines, one row",b', "", "naïve ☃,a", name="x.csv")
    data = load(DataOptions(data=path), 0)
    texts = {row["text"] for row in data.train + data.test}
    assert len(texts) == 10 and {"two lines, one row", "naïve ☃"} <= texts and data.names == ["a", "b"]
    columns = write_csv(tmp_path, name="y.csv", header="review,stars")
    assert load(DataOptions(data=columns, text_column="review", label_column="stars"), 0).names == ["a", "b"]
    tabs = write_lines(tmp_path, "z.tsv", "label\ttext", *[f"{i % 2}\tone, two {i}" for i in range(8)])
    assert load(DataOptions(data=tabs), 0).train[0]["text"].startswith("one, two")


def test_csv_with_a_text_of_any_length(tmp_path):
    data = load(DataOptions(data=str(write_csv(tmp_path, "word " * 40_000 + ",a"))), 0)
    assert max(len(row["text"]) for row in data.train + data.test) == 199_999


def test_json_lines_with_numbered_labels(tmp_path):
    extra = [json.dumps({"text": f"x{i}", "label": 10}) for i in range(4)]
    assert load(DataOptions(data=write_jsonl(tmp_path, *extra)), 0).names == ["0", "1", "10"]


def test_hub_texts(tmp_path):
    hub = pytest.importorskip("datasets")
    features = hub.Features({"text": hub.Value("string"), "label": hub.ClassLabel(names=["pos", "neg"])})
    rows = {"text": [f"words number {i}" for i in range(8)], "label": [i % 2 for i in range(8)]}
    part = hub.Dataset.from_dict(rows, features)
    part.save_to_disk(tmp_path / "one")
    hub.DatasetDict(train=part, validation=part.select(range(2))).save_to_disk(tmp_path / "two")
    (tmp_path / "three").mkdir()
    part.to_parquet(tmp_path / "three" / "train-00000-of-00001.parquet")
    part.select(range(2)).to_parquet(tmp_path / "three" / "test-00000-of-00001.parquet")
    for name, count in (("one", 2), ("two", 2), ("three", 2)):
        data = load(DataOptions(data=str(tmp_path / name)), 0)
        assert data.kind == "text" and data.names == ["pos", "neg"]
        assert (len(data.train), len(data.test)) == (6 if name == "one" else 8, count)


def test_hub_images(tmp_path):
    hub = pytest.importorskip("datasets")
    features = hub.Features({"img": hub.Image(), "label": hub.Value("string")})
    rows = {"img": [PIL.Image.new("L", (5, 6), i) for i in range(8)], "label": ["x", "y"] * 4}
    hub.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "x")
    data = load(DataOptions(data=str(tmp_path / "x"), image_column="img"), 0)
    assert data.kind == "image" and data.shape == (1, 6, 5) and data.names == ["x", "y"]
    with pytest.raises(ValueError, match="no column 'image' of images .* found img, label"):
        load(DataOptions(data=str(tmp_path / "x")), 0)


# ---- bad input: what makes it, the options beside --data, and what the line must say

BAD = [
    (lambda d: d / "none.csv", {}, "no such file or folder, nor one of digits, sentences"),
    (lambda d: write_lines(d, "x.xml", "<a/>"), {}, "unknown kind of file, known are .npz"),
    (lambda d: d, {}, "nothing known in this folder"),
    (lambda d: "digits", {"classes": ["5", "x"]}, "--classes x: unknown, --data digits has 0, 1, 2, 3, 4 and 5 more"),
    (lambda d: "digits", {"classes": ["5"]}, "at least two classes are needed, found only 5"),
    (lambda d: "digits", {"test_share": 0.0}, "--test_share 0.0: must be in (0, 1)"),
    (lambda d: "digits", {"test_share": 1e-4}, "--test_share 0.0001 of 1797 rows"),
    (lambda d: "digits", {"image_size": 3}, "--image_size 3: must be"),
    (lambda d: "digits", {"augment": ["shift", "zoom"]}, "--augment zoom: unknown, choose from shift, flip"),
    (lambda d: "sentences", {"augment": ["flip"]}, "--augment flip: for images only"),
    (lambda d: "sentences", {"max_length": 0}, "--max_length 0: must be"),
    (lambda d: "sentences", {"test_data": "digits"}, "--test_data digits: images, but --data has texts"),
    # arrays
    (lambda d: write_lines(d, "x.npz", "no zip"), {}, "not a readable .npz"),
    (lambda d: write_npz(d, labels=np.array([{}] * 12)), {}, "not a readable .npz file of plain arrays"),
    (lambda d: write_npz(d, images=np.zeros((12, 3))), {}, "images must be numbers of shape"),
    (lambda d: write_npz(d, images=np.zeros((0, 8, 8)), labels=np.zeros(0, int)), {}, "(0, 8, 8)"),
    (lambda d: write_npz(d, labels=np.arange(11)), {}, "labels must be 12 integers"),
    (lambda d: write_npz(d, labels=np.zeros(12, int)), {}, "at least two classes are needed, found only 0"),
    (lambda d: write_npz(d, labels=np.arange(12)), {}, "too few of 0 (1), 1 (1), 2 (1), 3 (1), 4 (1) and 7 more"),
    (lambda d: write_npz(d, images=np.full((12, 8, 8), np.nan)), {}, "image 0 contains NaN"),
    (lambda d: write_npz(d, size=3), {}, "at least 4 pixels high and wide, 1x3x3 found"),
    (lambda d: write_npz(d), {"test_data": ("x", 16)}, "test.npz: images of different sizes: image 0 is 1x16x16"),
    # CIFAR-10
    (lambda d: write_cifar(d, cut=1), {}, "data_batch_1.bin has 24583 bytes, not a multiple of 3073"),
    (lambda d: write_cifar(d, count=0), {}, "data_batch_1.bin has 0 bytes"),
    (lambda d: write_cifar(d) and write_lines(d, "batches.meta.txt", "a", "b") and d, {}, "has the label 3, there are 2"),
    # folders of images
    (lambda d: write_images(d, size=(6, 5)) and write_images(d, ("eel",), size=(7, 5)), {}, "eel/0.png is 3x5x7, cat/0.png is 3x5x6: make them one size with --image_size"),
    (lambda d: write_images(d) and write_lines(d / "cat", "z.png", "text") and d, {}, "1 broken files: cat/z.png: not an image"),
    (lambda d: write_images(d) and cut_file(d / "dog" / "2.png") and d, {}, "dog/2.png: "),
    (lambda d: write_images(d, mode="I;16"), {}, "pixels of mode I;16: save it with 8 bits a channel"),
    (lambda d: write_images(d) and (d / "eel").mkdir() or d, {}, "eel: no images"),
    (lambda d: write_images(d, ("cat",)), {}, "found only cat"),
    (lambda d: write_images(d / "train") and write_images(d / "test", ("dog", "elk")) and d, {}, "labels that the training part does not have: elk"),
    # texts
    (lambda d: write_lines(d, "x.csv"), {}, "empty, there are no rows"),
    (lambda d: write_csv(d, count=0), {}, "empty, there are no rows"),
    (lambda d: write_csv(d, labels="a"), {}, "at least two classes are needed, found only a"),
    (lambda d: write_csv(d, "last,c"), {}, "at least two rows of each class are needed, found too few of c (1)"),
    (lambda d: write_csv(d, header="review,stars"), {}, "no column 'text', found 'review', 'stars': name it with --text_column"),
    (lambda d: write_csv(d, header="text,stars"), {}, "no column 'label', found 'text', 'stars': name it with --label_column"),
    (lambda d: write_csv(d, header="text,label,text"), {}, "2 columns are named 'text': rename the others"),
    (lambda d: write_csv(d, "a,b,c", "one", "fine,a", "a,b,c"), {}, "3 broken lines: line 10: 3 fields instead of 2; line 11: 1 fields instead of 2; line 13: 3"),
    (lambda d: write_csv(d, *["one"] * 7), {}, "7 broken lines: line 10: 1 fields instead of 2; line 11: 1 fields instead of 2; line 12: 1 fields instead of 2; line 13: 1 fields instead of 2; line 14: 1 fields instead of 2; and 2 more"),
    (lambda d: write_csv(d, '"two\nlines",a', '"open,a', "more,b"), {}, "1 broken lines: line 12: unexpected end of data"),
    (lambda d: write_csv(d, " ,a", "<br/>&nbsp;,b", "text, "), {}, "line 10: empty text in 'text'; line 11: empty text in 'text'; line 12: no label in 'label'"),
    (lambda d: write_csv(d, b"caf\xe9,a"), {}, "line 10 is not UTF-8"),
    (lambda d: write_jsonl(d, "{"), {}, "line 9: not JSON"),
    (lambda d: write_jsonl(d, "[1]", '{"text": 3, "label": 1}', '{"text": "x", "label": 1.5}', '{"text": "\\ud800", "label": 1}'), {}, "4 broken lines: line 9: not an object; line 10: no text in 'text' but 3; line 11: no label in 'label' but 1.5; line 12: not valid Unicode"),
    (lambda d: write_lines(d, "x.jsonl", '{"body": "x", "label": 1}'), {}, "no column 'text', found 'body', 'label'"),
    (lambda d: write_csv(d), {"test_data": write_csv, "labels": "ax"}, "test.csv: labels that the training part does not have: x"),
]  # fmt: skip


def cut_file(path):
    content = path.read_bytes()
    return path.write_bytes(content[: len(content) - 30])


@pytest.mark.parametrize("make, more, said", BAD, ids=[str(i) + ": " + case[2][:40] for i, case in enumerate(BAD)])
def test_bad_input_is_said_in_one_line(tmp_path, make, more, said):
    more = dict(more)
    if more.get("test_data") == ("x", 16):
        more["test_data"] = write_npz(tmp_path, "test.npz", size=16)
    if more.get("test_data") is write_csv:
        more["test_data"] = write_csv(tmp_path, name="test.csv", labels=more.pop("labels"))
    with pytest.raises((ValueError, OSError)) as error:
        load(DataOptions(**{"data": str(make(tmp_path)), **more}), 0)
    message = str(error.value)
    assert said in message and message.startswith("--") and "\n" not in message


def test_a_damaged_hub_folder_is_said_once(tmp_path, monkeypatch):
    datasets, logged = pytest.importorskip("datasets"), []
    level = datasets.logging.get_verbosity()
    monkeypatch.setattr(logging.getLogger("datasets").handlers[0], "emit", logged.append)
    path = write_lines(tmp_path, "x.parquet", "no parquet")
    with pytest.raises(ValueError, match="not a readable data set"):
        load(DataOptions(data=str(tmp_path)), 0)
    assert not logged and datasets.logging.get_verbosity() == level
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"] and path


# ---- parts


def test_folds_cover_every_row_once():
    data = load(DataOptions(), 0)
    rows = data.train + data.test
    parts = folds(data, 5, 0)
    tests = [id(row) for part in parts for row in part.test]
    assert sorted(tests) == sorted(map(id, rows))
    whole = np.bincount(labels(rows))
    for part in parts:
        assert sorted(map(id, part.train + part.test)) == sorted(map(id, rows))
        assert np.abs(np.bincount(labels(part.test)) - whole / 5).max() <= 1
    again, other = folds(data, 5, 0), folds(data, 5, 1)
    assert labels(again[0].test) == labels(parts[0].test) != labels(other[0].test)


@pytest.mark.parametrize("k", [1, 175])
def test_folds_that_cannot_be(k):
    with pytest.raises(ValueError, match=f"--folds {k}: must be from 2 to 174"):
        folds(load(DataOptions(), 0), k, 0)


def test_shares_are_nested_and_stratified():
    data = load(DataOptions(), 0)
    small, half, whole = shares(data, [0.05, 0.5, 1.0], 0)
    names = [{id(row) for row in part.train} for part in (small, half, whole)]
    assert names[0] < names[1] < names[2] == {id(row) for row in data.train}
    count = np.bincount(labels(data.train))
    assert np.array_equal(np.bincount(labels(half.train)), np.ceil(count / 2))
    assert small.test is data.test


# ---- processors


def test_pixels_normalise_by_the_training_part(tmp_path):
    data = load(DataOptions(data=write_npz(tmp_path, channels=(3,))), 0)
    pixels = new_processor(data, DataOptions())
    images = torch.stack([pixels(row["image"]) for row in data.train])
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    pixels.save_pretrained(tmp_path / "saved")
    again = Pixels.from_pretrained(tmp_path / "saved")
    assert again.size == (8, 8) and torch.equal(again(data.test[0]["image"]), pixels(data.test[0]["image"]))


def test_a_constant_channel_is_not_divided_by_zero():
    pixels = Pixels.fit([torch.full((1, 4, 4), 0.5)] * 2)
    assert pixels(torch.full((1, 4, 4), 0.5)).abs().max() == 0


def test_pixels_read_the_settings_of_transformers(tmp_path):
    config = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2], "size": {"height": 6, "width": 4}}
    file = tmp_path / "preprocessor_config.json"
    for more, size in (
        ({}, (6, 4)),
        ({"do_center_crop": True, "crop_size": {"height": 5, "width": 5}}, (5, 5)),
        ({"size": {"shortest_edge": 7}}, (7, 7)),
        ({"size": 9}, (9, 9)),
    ):
        file.write_text(json.dumps({**config, **more}))
        pixels = Pixels.from_pretrained(tmp_path)
        assert pixels.size == size
        image = pixels(torch.full((1, 3, 3), 0.9))  # a gray image, repeated and made larger
        assert image.shape == (3, *size)
        torch.testing.assert_close(image[:, 0, 0], torch.tensor([2.0, 2.5, 3.0]))
    file.write_text(json.dumps({**config, "rescale_factor": 1 / 127.5}))
    torch.testing.assert_close(Pixels.from_pretrained(tmp_path)(torch.ones(3, 6, 4))[0, 0, 0], torch.tensor(7.5))
    file.write_text(json.dumps({**config, "do_normalize": False}))
    assert Pixels.from_pretrained(tmp_path)(torch.ones(3, 6, 4)).unique().tolist() == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"size": 4, "image_mean": [0], "image_std": [0]}',
        '{"size": {}, "image_mean": [0], "image_std": [1]}',
    ],
)
def test_pixels_refuse_other_settings(tmp_path, text):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match="not the settings of an image processor"):
        Pixels.from_pretrained(tmp_path)


def test_transformers_reads_the_settings_of_pixels(tmp_path):
    transformers = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    pixels = Pixels([0.5, 0.4, 0.3], [0.2, 0.3, 0.4], (6, 5))
    pixels.save_pretrained(tmp_path)
    theirs = transformers.ViTImageProcessorPil.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"][0]
    ours = pixels(torch.from_numpy(image).permute(2, 0, 1) / 255)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


CLEANED = [
    ("a  b\t\nc", "a b c"),
    ("<p class='x'>one<br/>two</p><!-- no -->", "one two"),
    ("a < b and c > d", "a < b and c > d"),
    ("&lt;b&gt;bold&lt;/b&gt; &amp; caf&eacute;", "bold & café"),
    ("see https://x.org/a?b=c or www.x.org now", "see or now"),
    ("ﬁne ｗｉｄｅ", "fine wide"),
    ("nul\x00 bell\x07 soft\u00adhyphen zero\u200bwidth", "nul bell softhyphen zerowidth"),
    ("می\u200cخواهم", "می\u200cخواهم"),
    ("Keeps Case", "Keeps Case"),
]


@pytest.mark.parametrize("text, expected", CLEANED)
def test_cleaning(text, expected):
    assert clean(text) == expected == clean(expected)


def test_no_clean_leaves_texts_and_case(tmp_path):
    options = DataOptions(data=write_csv(tmp_path, "<b>Bold</b>  Text,a"), no_clean=True)
    data = load(options, 0)
    assert "<b>Bold</b>  Text" in {row["text"] for row in data.train + data.test}
    tokenizer = new_processor(data, options)
    assert tokenizer("words").input_ids != tokenizer("WORDS").input_ids


def test_the_tokenizer_survives_saving_and_cleans_by_itself(tmp_path):
    tokenizer = new_processor(load(SENTENCES, 0), SENTENCES)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    plain, dirty = "Heavy rain fell on the coast.", "<p>Heavy  RAIN\x00 fell on the coast.</p>"
    expected = tokenizer(plain)
    assert set(expected) == set(again(plain)) == {"input_ids", "attention_mask"}
    assert again(dirty).input_ids == again(plain).input_ids == expected.input_ids == tokenizer(dirty).input_ids
    assert again.pad_token_id == 0 and again.model_max_length == 128
    assert tokenizer.unk_token_id not in expected.input_ids and tokenizer.unk_token_id in tokenizer("☃").input_ids


def test_the_tokenizer_of_the_same_texts_is_the_same():
    data = load(SENTENCES, 0)
    first, again = (new_processor(data, SENTENCES).backend_tokenizer.to_str() for _ in range(2))
    assert first == again


# ---- batches


def test_batches_of_texts_are_cut_and_padded(tmp_path):
    options = dataclasses.replace(SENTENCES, max_length=12)
    data = load(options, 0)
    tokenizer = new_processor(data, options)
    train, test, collate = datasets(data, tokenizer, options, 0)
    assert (len(train), len(test)) == (len(data.train), len(data.test))
    lengths = [len(train[i]["input_ids"]) for i in range(len(train))]
    assert max(lengths) == 12 > min(lengths)
    rows = [lengths.index(12), lengths.index(min(lengths))]
    batch = collate([train[i] for i in rows])
    assert set(batch) == {"input_ids", "attention_mask", "labels"} and batch["input_ids"].shape == (2, 12)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["attention_mask"].sum(1).tolist() == [12, min(lengths)]
    assert batch["labels"].tolist() == [data.train[i]["labels"] for i in rows]
    train.set_epoch(1)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        datasets(data, tokenizer, options, 0)


def image_sets(seed=0, **options):
    options = DataOptions(**options)
    data = load(options, 0)
    return data, *datasets(data, new_processor(data, options), options, seed)


def test_batches_of_images():
    data, train, test, collate = image_sets()
    batch = collate([train[i] for i in range(5)])
    assert batch["pixel_values"].shape == (5, 1, 8, 8) and batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == labels(data.train)[:5] and batch["labels"].dtype == torch.int64
    assert set(test[0]) == {"pixel_values", "labels"}


def test_images_of_channels_that_the_model_does_not_take(tmp_path):
    options = DataOptions(data=write_npz(tmp_path, channels=(3,)))
    with pytest.raises(ValueError, match="--data .*: the images have 3 channels, the model takes 1"):
        datasets(load(options, 0), Pixels([0.5], [0.5], (8, 8)), options, 0)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_changes_training_rows_and_repeats(name):
    _, plain, plain_test, _ = image_sets()
    _, train, test, _ = image_sets(augment=[name])
    rows = range(8)

    def images(part):
        return torch.stack([part[i]["pixel_values"] for i in rows])

    first = images(train)
    assert first.shape == images(plain).shape and not torch.equal(first, images(plain))
    assert torch.equal(images(test), images(plain_test))
    torch.rand(3), np.random.rand(3)  # numbers drawn elsewhere change nothing
    assert torch.equal(first, images(train))
    train.set_epoch(1)
    second = images(train)
    assert not torch.equal(first, second)
    train.set_epoch(0)
    assert torch.equal(first[[5]], train[5]["pixel_values"][None])
    _, other, _, _ = image_sets(seed=1, augment=[name])
    assert not torch.equal(images(other), first)


def test_augmentation_leaves_global_random_numbers_and_the_rows_alone():
    state, numpy_state = torch.get_rng_state(), str(np.random.get_state())
    image = torch.arange(60.0).reshape(1, 6, 10) / 60
    before = image.clone()
    changed = [augment(image, list(AUGMENTATIONS), 0, 0, index) for index in range(20)]
    assert all(other.shape == image.shape and other.dtype == torch.float32 for other in changed)
    assert torch.equal(image, before)
    assert torch.equal(state, torch.get_rng_state()) and numpy_state == str(np.random.get_state())


class Fixed:
    """A generator whose every draw is the largest that may come."""

    def integers(self, high):
        return high - 1

    def uniform(self, low, high):
        return high

    def random(self):
        return 0.25


def test_what_each_augmentation_does():
    image = torch.zeros(1, 8, 16)
    image[0, 4, 8] = 1
    moved = AUGMENTATIONS["shift"](image, Fixed())
    assert moved[0, 3, 6] == 1 and moved.sum() == 1  # by an eighth of 8 and of 16
    assert AUGMENTATIONS["flip"](image, Fixed())[0, 4, 7] == 1
    bar = torch.zeros(1, 41, 81)
    bar[0, :, 40] = 1  # a vertical line, leaning by tan(15 degrees) after the turn, whatever the aspect
    turned = AUGMENTATIONS["rotate"](bar, Fixed())[0]
    top, bottom = (float(turned[row].argmax()) for row in (5, 35))
    assert abs(abs(top - bottom) / 30 - np.tan(np.radians(15))) < 0.05
    noisy = AUGMENTATIONS["noise"](torch.zeros(1, 100, 100), np.random.default_rng(0))
    assert abs(noisy.std() - 0.05) < 0.002 and abs(noisy.mean()) < 0.002


def test_erase_fills_a_rectangle_with_the_mean_every_second_time():
    image = torch.arange(128.0).reshape(1, 8, 16)
    found = []
    for seed in range(40):
        erased = AUGMENTATIONS["erase"](image, np.random.default_rng(seed))
        changed = erased != image
        rows, columns = changed[0].any(1).sum(), changed[0].any(0).sum()
        assert rows <= 4 and columns <= 8 and changed.sum() == rows * columns
        assert (erased[changed] == image.mean()).all()
        found.append(bool(changed.any()))
    assert 10 < sum(found) < 30


def test_workers_that_live_on_see_the_epoch():
    _, train, _, collate = image_sets(augment=["shift"])
    loader = torch.utils.data.DataLoader(train, 64, collate_fn=collate, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        train.set_epoch(epoch)
        batch = list(loader)[0]["pixel_values"]
        assert torch.equal(batch, torch.stack([train[i]["pixel_values"] for i in range(64)]))


class Linear(torch.nn.Linear):
    def forward(self, pixel_values, labels):
        logits = super().forward(pixel_values.flatten(1))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_run_resumed_within_an_epoch_sees_the_same_augmentations(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    options = DataOptions(augment=["shift", "noise"])
    data = shares(load(options, 0), [0.05], 0)[0]  # 68 rows: 5 batches an epoch
    train, _, collate = datasets(data, new_processor(data, options), options, 0)

    def weights(resume=None):
        torch.manual_seed(0)
        args = TrainingArguments(
            str(tmp_path),
            max_steps=12,
            per_device_train_batch_size=16,
            save_steps=7,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(Linear(64, 10), args, collate, train, callbacks=[SetEpoch()])
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.weight

    whole = weights()
    train.set_epoch(0)
    assert torch.equal(whole, weights(str(tmp_path / "checkpoint-7")))
