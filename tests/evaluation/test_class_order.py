"""The backbone is tried on images: of two orders of classes the right one is taken, and what cannot be right is doubted."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device import drawn
from images import Oracle, opened, write_folder
from scipy.optimize import linear_sum_assignment
from torch import nn

from ptee._common.errors import Argument, DataError
from ptee.data.labels import class_orders, describe_labels, relabelled
from ptee.data.splits import Data
from ptee.evaluation.class_order import another_order, choose_class_order, labels_as_given

NAMES = [f"class{i}" for i in range(1, 13)]


@pytest.fixture
def numbered_classes(tmp_path) -> Data:
    """Pictures of class1 to class12, whose grey levels are 0 to 11."""
    for part in ("train", "val"):
        for k in range(10):
            write_folder(tmp_path / part, [f"{name}/{k}.png" for name in NAMES])
    return opened(tmp_path)


def backbone(order: list[str]) -> SimpleNamespace:
    return SimpleNamespace(module=Oracle([order.index(name) for name in NAMES]), num_classes=12)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_where_orders_differ_the_one_is_taken_under_which_the_backbone_is_right(library, numbered_classes):
    network = backbone(class_orders(NAMES)[library])
    network.module.train()
    found = choose_class_order(network, numbered_classes, check=False)
    assert list(found.classes) == class_orders(NAMES)[library]
    assert not found.doubt
    assert f"12 classes are taken in {library}'s order" in found.reason
    assert "class1, class10, class11" in found.reason and "class1, class2, class3" in found.reason
    mapped = relabelled(numbered_classes, found)
    answers = torch.stack([mapped.validation[i][0] for i in range(len(mapped.validation))])
    labels = [mapped.validation[i][1] for i in range(len(mapped.validation))]
    assert network.module(answers).argmax(1).tolist() == labels
    assert mapped.split["classes"] == list(found.classes)
    assert network.module.training  # is left as it was


def test_a_third_order_is_doubted_and_accuracy_refused(numbered_classes):
    found = choose_class_order(backbone(NAMES[6:] + NAMES[:6]), numbered_classes)
    assert re.search(r"right on 0\.0% of \d+ images, and would be on 8\.3% by chance", found.doubt)
    said = r"max_drop=0\.01 needs labels under which the backbone is right.*classes=FILE.*max_fid"
    with pytest.raises(DataError, match=said):
        found.require_accuracy(Argument("max_drop", "0.01"), Argument("max_fidelity_drop", "0.01"))


def of_answers(answers: list[list[int]]) -> tuple[SimpleNamespace, Data]:
    """A backbone and its images: of class c, the images that get the answers in `answers[c]`."""
    rows = [(answer, truth) for truth, own in enumerate(answers) for answer in own]
    images = [(torch.full((3, 4, 4), i / 255), truth) for i, (_, truth) in enumerate(rows)]
    module = Oracle([0] * len(rows))
    classes = 1 + max(len(answers) - 1, *(answer for answer, _ in rows))
    module.table = nn.Parameter(torch.eye(classes)[[answer for answer, _ in rows]])
    return SimpleNamespace(module=module, num_classes=classes), Data(images, images[:0], images[:0], (), "own", {})


@pytest.mark.parametrize(
    "answers",
    [
        [[0] * 9, [2] * 9 + [1], [1] * 9 + [2], [3] * 9, [4] * 9],
        [[0] * 9, [2] * 4 + [1], [3] * 4, [4] * 4 + [0], [1] * 4],
        [[0] * 60, [2] * 9, [1] * 9],
        [[0] * 30, [2] * 9, [3] * 9, [4] * 9, [0, 1, 2, 3, 4] * 2],
        [[0] * 30, [2] * 9, [3] * 9],
        [[0] * 30, [23] * 12, [48] * 12, [49] * 12],
    ],
    ids=[
        "two",
        "a ring of four",
        "rare ones",
        "a class replaced by an unknown one",
        "without a class in the middle",
        "numbers of their own",
    ],
)
def test_classes_that_are_taken_for_each_other_are_a_doubt_though_the_rest_is_right(answers):
    found = labels_as_given(*of_answers(answers))
    assert re.search(r"takes most images of some classes for others: 1 for \d+, .* in another order\.$", found.doubt)
    with pytest.raises(DataError, match="for others: 1 for "):
        found.require_accuracy(Argument("max_drop", "0.01"), Argument("max_fidelity_drop", "0.01"))


@pytest.mark.parametrize("missing", [1, 2])
def test_many_classes_behind_missing_ones_are_a_doubt_though_there_are_few_images_of_each(missing):
    answers = [[k, k] if k < 36 else [k + missing, k + missing] for k in range(60 - missing)]
    found = labels_as_given(*of_answers(answers))
    assert f"for others: 36 for {36 + missing}, 37 for {37 + missing}, " in found.doubt


def test_of_many_classes_only_those_in_question_are_compared_with_each_other(monkeypatch):
    shapes: list[torch.Size] = []

    def assign(fits: torch.Tensor, **how: bool) -> Any:
        shapes.append(fits.shape)
        return linear_sum_assignment(fits, **how)

    monkeypatch.setattr("scipy.optimize.linear_sum_assignment", assign)
    known = torch.arange(6000, device="cpu") % 2000
    answers = known.clone()
    answers[known == 7], answers[known == 1999] = 1999, 7
    answers[0], answers[1] = 5, 3
    many = torch.cat([known] * 3), torch.cat([answers] * 3)
    assert "7 for 1999, 1999 for 7: it may know" in another_order("twin", many[1], many[0], 2000)
    assert shapes == [(2, 2)]


def test_classes_that_the_backbone_never_answers_are_named_by_their_numbers():
    found = labels_as_given(*of_answers([[0] * 12, [1] * 12, [], [2] * 12, [3] * 12]))
    assert "for others: 3 for 2, 4 for 3." in found.doubt


@pytest.mark.parametrize(
    "answers",
    [
        [[0] * 6 + [1] * 6, [1] * 6 + [0] * 6, [2] * 12],
        [[0] * 9, [2] * 9, [2] * 9, [2] * 9],
        [[0] * 9, [1] * 9, [3] * 2, [2] * 2],
        [[0] * 9, [1] * 9, [3] * 3, [2] * 3],
        [[], [60] * 60 + [1] * 7],
        [[0] * 60, [2] * 5 + [1] * 3, [1] * 5 + [2] * 3],
        [[1] * 12, [2] * 12, [2] * 9, [3] * 60],
        [[2] * 12, [2] * 12, [3] * 12, [0, 1, 2] * 4, [4] * 60],
        [[0] * 24, [1] * 12, [4] * 12, [5] * 12],
        [[min(k + i, 9) for i in (0, 0, 0, 1, 1, 1, 1)] for k in range(10)],
        [[(k + 7 * k * k + 1) % 60 if k % 3 else k, k] for k in range(60)],
    ],
    ids=[
        *(
            "half",
            "all for one",
            "few images",
            "few classes",
            "a single class",
            "by luck",
            "no ring",
            "two for one",
            "for classes without images",
        ),
        *("the next of some that have an order", "many classes"),
    ],
)
def test_a_backbone_that_is_often_wrong_is_no_doubt(answers):
    assert not labels_as_given(*of_answers(answers)).doubt


@pytest.mark.parametrize(("right", "said"), [(3, True), (6, False)], ids=["few are right", "more than half are"])
def test_validation_images_of_which_far_fewer_are_right_than_of_training_images_are_told(right, said):
    wrong = [[(k + 1 + i % 4) % 5 for i in range(10 - right)] + [k] * right for k in range(5)]
    network, data = of_answers([[k] * 10 + wrong[k] for k in range(5)])
    places = {k: [i for i, (_, truth) in enumerate(data.train) if truth == k] for k in range(5)}
    halves = [[data.train[i] for own in places.values() for i in own[half]] for half in (slice(10), slice(10, 20))]
    found = labels_as_given(network, replace(data, train=halves[0], validation=halves[1]))
    assert not found.doubt
    words = r"right on 30% of 50 validation images .* and on 100% of 50 training images: see"
    assert bool(re.search(words, describe_labels(found))) is said


@pytest.mark.parametrize("wrong", ["train", "val"])
def test_labels_of_one_part_are_doubted_though_the_many_images_of_the_other_are_right(wrong, tmp_path):
    n = {"train": 30, "val": 30, wrong: 2}
    for part in ("train", "val"):
        names = NAMES[5:] + NAMES[:5] if part == wrong else NAMES
        for k in range(n[part]):
            write_folder(tmp_path / part, [f"{name}/{k}.png" for name in names])
    found = choose_class_order(backbone(class_orders(NAMES)["timm"]), opened(tmp_path))
    part = {"train": "Training", "val": "Validation"}[wrong]
    assert found.doubt.startswith(f"{part} images alone: The backbone is right on 0.0% of ")
    assert "Sort the images of all parts into class folders alike" in describe_labels(found)


def test_an_ordinary_backbone_of_any_accuracy_and_number_of_classes_is_not_doubted():
    random, on_cpu = drawn(), torch.device("cpu")
    for classes in (2, 3, 5, 10, 30):
        for _ in range(40):
            sure = (
                torch.rand(classes, classes, generator=random, device=on_cpu) ** 4
            )  # some classes are hard to tell apart
            share = (sure + sure.T + torch.eye(classes, device=on_cpu) * sure.max()).softmax(1)
            own = share.multinomial(120 // classes, True, generator=random).tolist()
            assert "for others" not in labels_as_given(*of_answers(own)).doubt


def test_an_order_of_neither_library_is_doubted_where_most_classes_are_right(numbered_classes):
    order = [*class_orders(NAMES)["timm"]]
    order[5:8] = [order[7], order[5], order[6]]
    found = choose_class_order(backbone(order), numbered_classes, check=False)
    assert re.search(r"for others: class\d+ for class\d+, .*in another order\.$", found.doubt)
    assert "classes=FILE" in str(DataError(found.doubt, *found.remedy))


def test_classes_whose_place_the_libraries_agree_on_are_looked_at_too(numbered_classes):
    order = [*class_orders(NAMES)["timm"]]
    order[0], order[-1] = order[-1], order[0]
    assert choose_class_order(backbone(order), numbered_classes, check=False).doubt


def test_random_weights_are_said_to_be_the_reason_and_not_an_order_of_classes(numbered_classes):
    network = backbone(NAMES[6:] + NAMES[:6])
    network.is_random = True
    found = choose_class_order(network, numbered_classes)
    assert found.doubt.endswith("by chance: its weights are random.")
    with pytest.raises(
        DataError, match=r"weights are random\. Give trained weights \(weights=FILE\)\. Or give max_fid"
    ):
        found.require_accuracy(Argument("max_drop", "0.01"), Argument("max_fidelity_drop", "0.01"))


@pytest.mark.parametrize("check", [True, False])
def test_an_order_without_a_choice_is_doubted_only_if_it_is_checked(check, tmp_path):
    data = opened(write_folder(tmp_path, [f"{name}/{k}.png" for k in range(20) for name in ("cat", "dog")]))
    network = SimpleNamespace(module=nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), num_classes=2)
    nn.init.zeros_(network.module[1].weight)  # always the same answer
    found = choose_class_order(network, data, check=check)
    assert bool(found.doubt) is check
    assert found.indices == (0, 1)


def test_folders_within_class_folders_that_may_be_the_classes_are_to_be_moved_up(tmp_path):
    write_folder(
        tmp_path / "train",
        [f"{kind}/{name}/{n}.png" for name in NAMES for n in range(3) for kind in (f"kind{len(name)}",)],
    )
    found = choose_class_order(backbone(NAMES), opened(tmp_path))
    said = describe_labels(found)
    assert said.startswith("The 2 classes (kind6, kind7) cannot be mapped to the backbone's 12")
    assert said.endswith(
        "12 others (class1, class10, class11, class12, class2 and 7 more), as many as it has classes: if these are the classes, move them up."
    )


def test_a_backbone_that_is_right_on_very_few_images_is_not_doubted(tmp_path):
    data = opened(write_folder(tmp_path / "val", ["cat/0.png", "dog/1.png"]).parent, report_only=True)
    assert not choose_class_order(SimpleNamespace(module=Oracle([0, 1]), num_classes=2), data).doubt


def test_data_sets_with_numbers_of_their_own_are_not_reordered():
    data = opened("digits")
    module = Oracle([0] * 256)
    module.table = nn.Parameter(torch.rand(256, 10))
    assert choose_class_order(SimpleNamespace(module=module, num_classes=10), data).indices == tuple(range(10))


def test_names_that_are_given_go_before_the_libraries_orders(numbered_classes):
    order = NAMES[6:] + NAMES[:6]
    found = choose_class_order(backbone(order), numbered_classes, classes=order)
    assert list(found.classes) == order and not found.doubt


def test_classes_that_a_run_recorded_are_taken_if_the_backbone_knows_them_so(numbered_classes):
    order = NAMES[6:] + NAMES[:6]
    found = choose_class_order(backbone(order), numbered_classes, recorded=order)
    assert list(found.classes) == order and not found.doubt


def test_the_order_of_names_whose_accents_were_written_in_another_way_is_found(tmp_path):
    animals = ["élan", "faon", "gnou", "zebu", "âne", "boa", "chat", "daim", "hase", "lynx", "ours", "puma"]
    trained = sorted(unicodedata.normalize("NFC", name) for name in animals)
    here = [unicodedata.normalize("NFD", name) for name in trained]  # as an archive made on a Mac has them
    assert sorted(here) != here
    for part in ("train", "val"):
        for k in range(10):
            write_folder(tmp_path / part, [f"{name}/{k}.png" for name in here])
    network = SimpleNamespace(module=Oracle(list(range(12))), num_classes=12)
    found = choose_class_order(network, opened(tmp_path))
    assert list(found.classes) == here and not found.doubt
    assert "order of names with accents as NFC" in found.reason


def test_recorded_classes_are_refused_if_the_backbone_is_right_in_the_order_of_their_names(numbered_classes):
    network, swapped = backbone(NAMES), [*NAMES[1::-1], *NAMES[2:]]
    with pytest.raises(
        DataError, match=r"classes are class2, class1, .* right on 0%.*100% .*Copy it again.*classes=FILE"
    ):
        choose_class_order(network, numbered_classes, recorded=swapped)
    assert choose_class_order(network, numbered_classes, recorded=swapped, classes=NAMES).indices is not None


@pytest.mark.parametrize(
    "images",
    [
        [(torch.full((3, 4, 4), i / 255), torch.tensor([i])) for i in range(12)],
        [{"image": torch.full((3, 4, 4), i / 255), "label": i} for i in range(12)],
    ],
    ids=["(b, 1)", "mapping"],
)
def test_labels_of_any_form_that_a_batch_can_have_are_tried(images):
    data = Data(images, images[:0], images[:0], (), "your own data sets", {})
    network = SimpleNamespace(module=Oracle(list(range(12))), num_classes=12)
    assert not labels_as_given(network, data).doubt
    wrong = SimpleNamespace(module=Oracle(list(range(12))[::-1]), num_classes=12)
    assert "right on 0.0% of 12 images" in labels_as_given(wrong, data).doubt
