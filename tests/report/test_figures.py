"""Figures: valid PNGs, equal bytes for equal numbers, any class names and images."""

import pytest
import torch

from kdbench.report import figures


def matrix(classes: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 3, (classes, classes), generator=draw) + 50 * torch.eye(classes, dtype=torch.int64)


def decoded(picture: figures.Picture):
    import io

    from PIL import Image

    with Image.open(io.BytesIO(picture.png)) as image:
        image.load()
        return image


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_a_confusion_matrix_is_a_png_of_the_reported_size(classes):
    picture = figures.draw_confusion(matrix(classes), [f"class {i}" for i in range(classes)], title="student on test")
    assert decoded(picture).size == (picture.width, picture.height)
    assert picture.width < 2000 and picture.height < 2000


def test_equal_numbers_give_equal_bytes():
    assert figures.draw_confusion(matrix(10)).png == figures.draw_confusion(matrix(10)).png


def test_an_empty_matrix_and_an_empty_class_do_not_fail():
    figures.draw_confusion(torch.zeros(3, 3, dtype=torch.int64))
    figures.draw_confusion(torch.tensor([[5, 0], [0, 0]]), ["a"])  # names that do not fit are left out


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("teacher", [True, False])
def test_predictions_take_any_kind_of_image(channels, teacher):
    logits = torch.randn(5, 3)
    for image in (torch.rand(5, channels, 8, 6), 3 * torch.randn(5, channels, 8, 6), torch.zeros(5, channels, 8, 6)):
        samples = {"image": image, "label": torch.tensor([0, 1, 2, 0, -100]), "student": logits}
        picture = figures.draw_predictions(
            {**samples, "teacher": logits if teacher else None}, ["a", "b $x_1$", "c" * 40]
        )
        assert decoded(picture).size == (picture.width, picture.height)


def test_class_names_are_plain_text_in_any_script():
    names = ["$\\broken$", "猫", "a_b^c"]
    figures.draw_confusion(matrix(3), names)
    figures.draw_confusion(matrix(40), [*names, *map(str, range(37))])
    figures.draw_predictions(
        {"image": torch.rand(3, 1, 4, 4), "label": torch.arange(3), "student": torch.eye(3)}, names
    )


def test_uint8_and_float_images_give_the_same_figure():
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    other_fields = {"label": torch.tensor([0, 1]), "student": torch.eye(2)}
    assert (
        figures.draw_predictions({"image": image, **other_fields}).png
        == figures.draw_predictions({"image": image / 255, **other_fields}).png
    )
