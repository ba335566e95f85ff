"""Settings inside lists and unions are checked like any others."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from torch import nn

from bimamba_lit.binarize import LatentLinear
from bimamba_lit.errors import UserError
from bimamba_lit.training.recipe_check import check_settings


@dataclass
class Text:
    path: str
    weight: float = 1.0


class Reader:
    def __init__(
        self,
        train: str | Text | list[str | Text],
        more: list[Text] | None = None,
        size: int = 3,
        shares: dict[str, float] | None = None,
    ) -> None: ...


GROUPS = {"data": type[Reader]}


def check(**settings: object) -> None:
    name = f"{__name__}.Reader" if "." in __name__ else "Reader"
    check_settings({"data": {"class_path": name, "init_args": settings}}, GROUPS)


@pytest.mark.parametrize(
    "train",
    [
        "a.txt",
        {"path": "a.txt"},
        ["a.txt", {"path": "b.txt", "weight": 2}],
        [{"path": "a.txt", "weight": 0.5}],
    ],
)
def test_what_fits_passes(train):
    check(train=train)
    check(train=train, more=None)
    check(train=train, more=[{"path": "a.txt"}])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train": {"path": "a", "wieght": 2}}, r"data.init_args.train has no key 'wieght'; did you mean 'weight'\?"),
        ({"train": ["a", {"path": "b", "wieght": 2}]}, r"train\[1\] has no key 'wieght'; did you mean 'weight'\?"),
        ({"train": [{"weight": 2}]}, r"train\[0\] has no 'path', which Text needs"),
        ({"train": ["a", {"path": "b", "weight": "much"}]}, r"train\[1\].weight: 'much' is not right.*a number"),
        ({"train": [3.5, "a"]}, r"train\[0\]: 3.5 is not right"),
        ({"train": "a", "more": [{"pth": "b"}]}, r"more\[0\] has no key 'pth'; did you mean 'path'\?"),
        ({"train": "a", "more": "b"}, "more"),
        ({"train": "a", "size": None}, "size: null is not right, it must be a whole number"),
        (
            {"train": "a", "shares": {"a": 1, "b:0.5": None}},
            "shares: .* a dict.*; YAML wants a space after the colon of b:0.5",
        ),
        ({"train": "a", "shares": "{b:[1,0]}"}, "shares: .* a dict.*; YAML wants a space after the colon of b:$"),
        ({"train": "a", "shares": {1: 0.5}}, "shares: the key 1 is not right, it must be text"),
        ({"train": "a", "shares": {"a": 1, None: 0.5}}, "shares: the key null is not right, it must be text"),
        ({"trian": "a"}, r"data.init_args has no key 'trian'; did you mean 'train'\?"),
    ],
)
def test_what_does_not_is_named(settings, told):
    with pytest.raises(UserError, match=told):
        check(**settings)


def test_why_a_class_cannot_be_had_is_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "needs_a_name.py").write_text("from os import a_name_that_is_not_there")
    for name, told in {
        "needs_more.Reader": "'needs_more.Reader' cannot be imported: No module named 'a_package_that_is_not_there'",
        "needs_a_name.Reader": "cannot be imported: cannot import name 'a_name_that_is_not_there'",
        "not_there.Reader": "there is no class 'not_there.Reader'$",
        "not_there.inside.Reader": "there is no class 'not_there.inside.Reader'$",
        "json.not_there.Reader": "there is no class 'json.not_there.Reader'$",
        "json.Reader": "there is no class 'json.Reader'$",
    }.items():
        with pytest.raises(UserError, match=f"data.class_path: .*{told}"):
            check_settings({"data": {"class_path": name}}, GROUPS)


class Student:
    def __init__(self, binarizer: Callable[[nn.Linear], LatentLinear]) -> None: ...


@pytest.mark.parametrize("key", ["straight_through", "linear"])  # the second is what the program gives
def test_a_scheme_without_options_says_so(key):
    scheme = {"class_path": "bimamba_lit.binarize.ParetoQ", "init_args": {key: "tanh"}}
    name = f"{__name__}.Student" if "." in __name__ else "Student"
    student = {"class_path": name, "init_args": {"binarizer": scheme}}
    with pytest.raises(UserError, match=f"binarizer.init_args has no key '{key}'; ParetoQ takes none$"):
        check_settings({"model": student}, {"model": type[Student]})


def test_known_schemes_are_those_that_can_be_had():
    name = f"{__name__}.Student" if "." in __name__ else "Student"
    student = {"class_path": name, "init_args": {"binarizer": {"class_path": "Nothing"}}}
    with pytest.raises(UserError, match="there is no LatentLinear 'Nothing'; known are FBI, ") as told:
        check_settings({"model": student}, {"model": type[Student]})
    assert "BinaryLinear" not in str(told.value)
