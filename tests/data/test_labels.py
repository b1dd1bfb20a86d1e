"""Classes of the data go to the right classes of the backbone, or it is said why not."""

from __future__ import annotations

import re

import pytest
import torch
from images import levels, opened, write_folder

from ptee._common.errors import DataError
from ptee.data.batches import UNKNOWN_LABEL
from ptee.data.labels import (
    LabelMap,
    class_orders,
    map_labels,
    names_differ,
    near_chance,
    recorded_classes,
    relabelled,
    usable_labels,
)

THOUSAND = sorted(map(str, range(1000)))  # as text: 0, 1, 10, 100, ...


@pytest.mark.parametrize(
    ("class_names", "num_classes", "indices", "said"),
    [
        (["n01440764", "n01443537", "n15075141"], 1000, (0, 1, 999), "ImageNet-1k classes"),
        (["n01440764", "n00000000"], 1000, None, "not among the classes of ImageNet-1k: n00000000"),
        (["n01440764", "n02102040"], 2, (0, 1), "in this order"),
        (["0", "7"], 10, (0, 7), "names are taken for numbers of the backbone's 10"),
        (["0", "1", "10", "2"], 100, (0, 1, 10, 2), "taken for numbers"),
        (THOUSAND, 1000, tuple(map(int, THOUSAND)), "taken for numbers of the backbone's 1000"),
        (sorted(map(str, range(12))), 12, tuple(range(12)), r"in this order: 0, 1, 10, 11, 2 and 7 more\.$"),
        ([f"{i:02}" for i in range(12)], 12, tuple(range(12)), r"in this order: 00, 01, 02, 03, 04 and 7 more\.$"),
        (["1", "2"], 2, (0, 1), "in this order: 1, 2"),
        (["07", "7"], 10, None, "cannot be mapped"),
        (["0 - zero", "1 - one"], 2, (0, 1), "in this order: 0 - zero"),
        (["cat", "dog"], 2, (0, 1), "in this order: cat, dog"),
        (["a\nb", "c"], 2, (0, 1), r"in this order: a\\nb, c"),
        (["cat", "dog"], 3, None, r"cannot be mapped .* by its numbers, 0 to 2, or .* \(classes=FILE\)\.$"),
        (["7"], 10, (7,), "The 1 class name is taken for a number of"),
        (["n01440764"], 1000, (0,), "^1 WordNet id is mapped"),
        (
            ["all"],
            3,
            None,
            r"cannot be mapped to the backbone's 3, so the images count as unlabelled\.$",
        ),  # as where there are no labels
        (
            ["a", "b", "c"],
            2,
            None,
            r"cannot be mapped to the backbone's 2, .* Leave out the folders that are .* If these are 2,",
        ),
        (["²", "cat"], 3, None, "cannot be mapped"),
    ],
)
def test_names_become_the_backbones_classes_and_the_reason_is_said(class_names, num_classes, indices, said):
    found = map_labels(class_names, num_classes)
    assert found.indices == indices
    reason = str(DataError(found.reason, " " * bool(found.remedy), *found.remedy))
    assert re.search(said, reason) and "\n" not in reason


def test_a_run_records_the_names_of_all_of_imagenets_classes_where_the_data_have_some_of_them(tmp_path):
    write_folder(tmp_path, [f"{name}/{n}.png" for name in ("n01443537", "n15075141") for n in range(12)])
    data = opened(tmp_path)
    names = relabelled(data, map_labels(data.class_names, 1000)).split["classes"]
    assert (len(names), names[1], names[999]) == (1000, "n01443537", "n15075141")


def test_folders_of_numbers_get_the_classes_that_image_folder_gave_them(tmp_path):
    from torchvision.datasets import ImageFolder

    write_folder(tmp_path, [f"{i}/{i}.png" for i in range(12)])
    data = opened(tmp_path)
    mapped = relabelled(data, map_labels(data.class_names, 12)).train
    trained = dict(ImageFolder(str(tmp_path)).samples)
    for i, level in enumerate(levels(data.train)):
        assert mapped[i][1] == trained[str(tmp_path / f"{level}" / f"{level}.png")]


def test_digits_are_no_class_numbers_of_a_larger_backbone():
    assert map_labels(opened("digits").class_names, 1000).indices is None


@pytest.mark.parametrize(("names", "expected"), [(("1", "0"), {1, 0}), (("x", "y"), {UNKNOWN_LABEL})])
def test_relabelled_data_has_mapped_labels_and_the_same_images(names, expected, folder):
    data = opened(folder)
    mapped = relabelled(data, map_labels(names, 3))
    assert levels(mapped.validation) == levels(data.validation)
    assert {label for _, label in mapped.validation} == expected
    assert {label for _, label in data.validation} == {0, 1}


def test_the_orders_of_timm_and_torchvision_are_theirs(tmp_path):
    from timm.data import create_dataset
    from torchvision.datasets import ImageFolder

    names = ["class1", "class10", "class2", "Zebra", "ant", "07", "7a"]
    write_folder(tmp_path, [f"{name}/0.png" for name in names])
    orders = class_orders(names)
    assert orders["torchvision"] == ImageFolder(str(tmp_path)).classes
    timm = create_dataset("", root=str(tmp_path)).reader.class_to_idx
    assert orders["timm"] == sorted(timm, key=timm.get)


def test_a_file_of_names_settles_the_order(tmp_path):
    (tmp_path / "classes.txt").write_text("\ufeffdog\r\ncat \nowl\n\n", encoding="utf-8")
    found = map_labels(["cat", "dog"], 3, classes=tmp_path / "classes.txt")
    assert (found.indices, found.classes) == ((1, 0), ("dog", "cat", "owl"))
    assert "classes.txt'" in found.reason


def test_a_file_may_write_accents_in_another_way(tmp_path):
    (tmp_path / "classes.txt").write_text("th\u00e9\ncaf\u00e9\n", encoding="utf-8")
    assert map_labels(["cafe\u0301"], 2, classes=tmp_path / "classes.txt").indices == (1,)


def test_a_name_that_two_classes_of_the_backbone_share_is_refused_only_if_the_data_have_it(tmp_path):
    names = ["crane", "owl", "crane", "maillot"]  # as lists of ImageNet's names have it
    (tmp_path / "classes.txt").write_text("\n".join(names))
    for classes in (names, tmp_path / "classes.txt"):
        assert map_labels(["maillot", "owl"], 4, classes=classes).indices == (3, 1)
        with pytest.raises(DataError, match=r"names crane more than once: give .* one name"):
            map_labels(["crane", "owl"], 4, classes=classes)


def test_a_class_that_was_renamed_is_refused_and_never_numbered_anew():
    run = ["bird", "cat", "dog"]
    with pytest.raises(DataError, match=r"model does not know: kitten\. .* do not have: cat\. .*classes=FILE"):
        recorded_classes(["bird", "dog", "kitten"], run, 3)
    with pytest.raises(DataError, match=r"model does not know: zebra\. The model has all others: leave these out\.$"):
        recorded_classes([*run, "zebra"], run, 3)
    assert recorded_classes(["cat", "dog"], run, 3) == run
    assert recorded_classes(["0", "1", "2"], run, 3) is None  # other names altogether
    assert recorded_classes(["cafe\u0301"], ["caf\u00e9"], 1) == ["caf\u00e9"]


def test_beside_a_doubt_it_is_said_that_no_folder_has_a_name_that_the_run_knows():
    doubted = LabelMap((0, 1), "", doubt="The backbone is near chance.")
    said = names_differ(doubted, ["Hund", "Katze"], ["cat", "dog"]).doubt
    assert said == "The backbone is near chance. The run's own classes are cat, dog: none of these has such a name."
    for labels, recorded in ((doubted, ["cat", "Hund"]), (doubted, []), (LabelMap((0, 1), ""), ["cat", "dog"])):
        assert names_differ(labels, ["Hund", "Katze"], recorded) is labels


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cat\n", "names 1 class, but"),
        ("cat\ndog\n", "names 2 classes, but the backbone has 3"),
        ("cat\ndog\ncat\n", "names cat more than once"),
        ("cat\nDog\nowl\n", r"lacks classes of the data: dog \(did you mean 'Dog'\?\)"),
        ("cat\n\ndog\n", "holds an empty line"),
        ("", "holds no class names"),
        ('["cat", "dog", "owl"]', r"is JSON: give a text file with one class name a line"),
        ('{\n  "cat": 0,\n  "dog": 1,\n  "owl": 2\n}\n', r"is JSON: give a text file"),
        ("\xff\xfec\0a\0t\0", r"cannot be read \(it is not in UTF-8\): save it as UTF-8, one name a line"),
        (None, r"classes\.txt' cannot be read \(No such file"),
    ],
    ids=["one", "too few", "twice", "other names", "gap", "empty", "JSON", "JSON in lines", "UTF-16", "no file"],
)
def test_a_file_of_other_names_is_refused(text, said, tmp_path):
    if text is not None:
        (tmp_path / "classes.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=said):
        map_labels(["cat", "dog"], 3, classes=tmp_path / "classes.txt")


@pytest.mark.parametrize(
    "line", ["{n} {name}", "{n}: '{name}',", '"{name}"', "{name},{n}", '"{n}","{name}"', "{n}\t{name}"]
)
def test_names_with_numbers_or_quotes_are_refused_and_bare_ones_asked_for(line, tmp_path):
    lines = [line.format(n=n, name=name) for n, name in enumerate(["cat", "dog 2", "fox (red)"])]
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    said = f"txt' has lines such as {lines[0]}: give one bare name a line, without numbers or quotes."
    with pytest.raises(DataError, match=re.escape(said)):
        map_labels(["cat", "fox (red)"], 3, classes=tmp_path / "classes.txt")


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ([1, 2], "The list of classes: name 1 is 1 of type int, and no text"),
        (["cat", None], "The list of classes: name 2 is None of type NoneType, and no text"),
        (["cat", b"dog"], "name 2 is b'dog' of type bytes, and no text"),
        (b"cat", "must be a list of the backbone's class names"),
        (
            ["cat", "d\nog"],
            r"name 2 has a character that no name may have, U\+000A: 'd\\nog'\. A class has a name in one line",
        ),
        (
            ["\u200ecat", "dog"],
            r"name 1 has a character that no name may have, U\+200E: '\\u200ecat'",
        ),
        (["cat", "x" * 256], r"name 2 has 256 letters \('x.*\.\.\.\)\. .* of 255 letters at most"),
        (["cat", " "], "name 2 is empty"),
        ({"cat": 0, "dog": 1}, "must be a list of the backbone's class names in its order"),
        (7, "classes=7 must be a list"),
    ],
    ids=str,
)
def test_what_is_no_name_of_a_class_is_refused_before_anything_is_tried(classes, said):
    with pytest.raises(DataError, match=said):
        map_labels(["cat", "dog"], 2, classes=classes)


@pytest.mark.parametrize("mark", ["\u200b", "\ufeff", "\u00ad"])
def test_names_that_look_the_same_and_are_not_are_told_apart(mark, tmp_path):
    shown = re.escape(ascii(mark)[1:-1])
    with pytest.raises(DataError, match=rf"lacks classes of the data: dog \(did you mean 'do{shown}g'\?\)"):
        map_labels(["cat", "dog"], 2, classes=["cat", f"do{mark}g"])
    with pytest.raises(DataError, match=rf"lacks classes of the data: {shown}dog \(did you mean 'dog'\?\)"):
        map_labels(["cat", f"{mark}dog"], 2, classes=["cat", "dog"])
    assert map_labels(["cat", f"{mark}dog"], 2, classes=[f"{mark}dog", "cat"]).indices == (1, 0)


def test_a_line_of_a_file_that_is_no_name_is_named_by_its_number(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n" + "z" * 300)
    with pytest.raises(DataError, match=r"classes\.txt': name 3 has 300 letters"):
        map_labels(["cat", "dog"], 3, classes=tmp_path / "classes.txt")


def test_a_few_images_say_nothing_about_whether_the_backbone_is_right():
    assert not any(near_chance(0.0, n, 10) for n in range(1, 10))
    assert near_chance(0.0, 10, 10) == "The backbone is right on 0.0% of 10 images, and would be on 10.0% by chance"


def test_labels_are_used_if_all_images_have_one_that_is_a_class():
    labels = torch.tensor([0, 2, 1])
    assert usable_labels(labels, 3) == (labels, "")
    assert usable_labels(torch.tensor([-1, -1]), 3) == (None, "")
    assert usable_labels(labels + 3, 3) == (None, "the labels are 3 to 5, the backbone's classes 0 to 2")
    with pytest.raises(DataError, match="Some images have labels and others have none"):
        usable_labels(torch.tensor([0, -1]), 3)
