"""Error messages are one readable line for any input."""

import pytest

from codi.errors import UserError, nearest, one_line


@pytest.mark.parametrize("limit", [80, 200])
@pytest.mark.parametrize("length", [1, 79, 80, 81, 200, 201, 5_000])
def test_one_line_shortens_long_text_in_the_middle(length, limit):
    text = "a" * (length - 1) + "z"
    line = one_line(text, limit)
    assert line[-1] == "z" and len(line) == min(length, limit) and (line == text) == (length <= limit)
    assert one_line("two\n  lines\t") == "two lines"


def test_messages_have_a_maximum_length():
    message = str(UserError(f"file.json: {'x ' * 100_000}: fix it"))
    assert len(message) == UserError.MAX_LENGTH and message.startswith("file.json: x") and message.endswith(": fix it")
    assert str(UserError("a  b.png: missing")) == "a  b.png: missing"  # spaces in a name are kept


def test_nearest_ignores_non_string_and_very_long_keys():
    assert nearest(5, ["size"]) == "" and nearest("siz" + "e" * 5_000, ["size"]) == ""


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("x: " + "a" * 5_000, "unknown key 'x'"),
        ("a" * 120 + ": 1", "unknown key"),
        ("5: 1", "unknown key 5"),
        ("images: " + "a" * 5_000, "images is 'aaa"),
        ("images: " + "9" * 5_000, "not valid YAML"),
        ("images: 2024-13-45", "not valid YAML"),
        ("images: 1e999", "images is '1e999'"),
    ],
)
def test_recipe_values_are_shortened_in_messages(tmp_path, recipe, expected):
    from codi.training.distill_recipe import DistillRecipe
    from codi.training.recipe import build, read_recipe

    file = tmp_path / "recipe.yaml"
    file.write_text(f"out: there\n{recipe}\n")
    with pytest.raises(UserError) as error:
        build(DistillRecipe, read_recipe(file), "recipe.yaml")
    assert expected in str(error.value) and "a" * 100 not in str(error.value) and len(str(error.value)) < 800
