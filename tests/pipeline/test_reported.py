from types import SimpleNamespace

import pytest

from ptee.pipeline.reported import class_names


@pytest.mark.parametrize(("classes", "names"), [(["dog", "cat"], ("dog", "cat")), (["dog"], ()), (None, ())])
def test_classes_are_named_in_the_order_of_the_backbone_or_not_at_all(classes, names):
    split = {} if classes is None else {"classes": classes}
    data = SimpleNamespace(class_names=("cat", "dog"), split=split)  # as the folders stand
    run = SimpleNamespace(unseen=SimpleNamespace(data=data), model=SimpleNamespace(num_classes=2))
    assert class_names(run) == names
