import pytest
from torchvision.datasets import ImageFolder as TorchvisionFolder
from trees import touch

from spd_fast.datasets.folder import ImageFolder
from spd_fast.errors import InputError


def test_image_folder_equals_torchvision(tmp_path):
    names = ("b/2.JPEG", "b/10.png", "a/deep/er/1.jpg", "a/0.jpg", "c/x.webp", "b/notes.txt")
    touch(tmp_path, *names)
    ours, theirs = ImageFolder(tmp_path), TorchvisionFolder(tmp_path)
    assert ours.classes == theirs.classes == ["a", "b", "c"]
    pairs = zip(map(str, ours.paths), ours.labels)
    assert sorted(pairs) == sorted(theirs.samples) and len(ours) == 5
    assert ours.paths == sorted(ours.paths)


def test_image_folder_of_several_roots(tmp_path):
    touch(tmp_path, "one/cat/1.jpg", "one/dog/1.jpg", "two/cat/2.jpg", "two/0.jpg", "two/ant/3.jpg")
    data = ImageFolder([tmp_path / "two", str(tmp_path / "one")])
    assert data.classes == ["ant", "cat", "dog", "two"]
    found = [
        (str(p.relative_to(tmp_path)), data.classes[k]) for p, k in zip(data.paths, data.labels)
    ]
    assert found == [
        ("two/0.jpg", "two"),
        ("two/ant/3.jpg", "ant"),
        ("two/cat/2.jpg", "cat"),
        ("one/cat/1.jpg", "cat"),
        ("one/dog/1.jpg", "dog"),
    ]


def test_image_folder_named_by_a_relative_path(tmp_path, monkeypatch):
    touch(tmp_path, "photos/1.jpg")
    monkeypatch.chdir(tmp_path / "photos")
    assert ImageFolder(".").classes == ["photos"]


def test_image_folder_follows_links_but_not_in_circles(tmp_path):
    touch(tmp_path, "root/a/1.jpg", "root/b/2.jpg", "elsewhere/3.jpg", "root/.cache/9.jpg")
    root = tmp_path / "root"
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "itself").symlink_to("itself")
    (root / "a" / "to_b").symlink_to(root / "b")
    (root / "b" / "to_a").symlink_to(root / "a")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    data = ImageFolder(root)
    found = {str(path.relative_to(root)) for path in data.paths}
    assert found >= {"a/1.jpg", "b/2.jpg", "c/3.jpg", "a/to_b/2.jpg", "b/to_a/1.jpg", "b/gone.jpg"}
    assert len(found) == len(data) < 12 and data.classes == ["a", "b", "c"]


def test_image_folder_without_images(tmp_path):
    touch(tmp_path, "full/1.jpg", "empty/notes.txt")
    with pytest.raises(InputError, match="there is no image in .*empty or below"):
        ImageFolder([tmp_path / "full", tmp_path / "empty"])
    with pytest.raises(InputError, match="there is no directory .*none"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(InputError, match="no directory of images"):
        ImageFolder([])
