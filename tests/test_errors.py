"""Messages are one line that a person can read, whatever was given."""

import pytest

from codi.errors import UserError, nearest, one_line


@pytest.mark.parametrize("most", [80, 200])
@pytest.mark.parametrize("length", [1, 79, 80, 81, 200, 201, 5_000])
def test_a_long_text_loses_its_middle(length, most):
    text = "a" * (length - 1) + "z"
    line = one_line(text, most)
    assert line[-1] == "z" and len(line) == min(length, most) and (line == text) == (length <= most)
    assert one_line("two\n  lines\t") == "two lines"


def test_no_message_echoes_a_whole_file():
    message = str(UserError(f"file.json: {'x ' * 100_000}: fix it"))
    assert len(message) == UserError.MAX_LENGTH and message.startswith("file.json: x") and message.endswith(": fix it")
    assert str(UserError("a  b.png: missing")) == "a  b.png: missing"  # a name stays as it is


def test_a_key_that_is_no_text_has_no_near_one():
    assert nearest(5, ["size"]) == "" and nearest("siz" + "e" * 5_000, ["size"]) == ""


@pytest.mark.parametrize(
    ("recipe", "told"),
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
def test_values_of_a_recipe_are_shortened(tmp_path, recipe, told):
    from codi.training.distill_recipe import DistillRecipe
    from codi.training.recipe import build, read_recipe

    file = tmp_path / "recipe.yaml"
    file.write_text(f"out: there\n{recipe}\n")
    with pytest.raises(UserError) as error:
        build(DistillRecipe, read_recipe(file), "recipe.yaml")
    assert told in str(error.value) and "a" * 100 not in str(error.value) and len(str(error.value)) < 800
