"""Small classification sets in the layouts of the originals, with real JPEG, MAT, XML, JSON, pickle and bin files.

Every image has a red of 40 times its label, so that a label that belongs to another image shows.
"""

import io
import json
import pickle
import struct

import numpy as np
from PIL import Image
from scipy.io import savemat

from bissl_zoo.data.datasets.voc import VOC_CLASSES

#: images per class of a part, and classes
SIZES = {"trainval": 10, "train": 6, "val": 4, "test": 5}
CLASSES = ["Great_Auk", "dodo", "moa"]
WORDNET = ["n01440764", "n01443537", "n02102040"]
CALTECH = 34


def shade(label):
    return 40 * label


def picture(path, label, number=0, size=(12, 9)):
    """An image file of a label; its lower half has another blue, since runs refuse sets of plain images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, (shade(label), 10 + number % 200, 90))
    image.paste((shade(label), 10 + number % 200, 130), (0, size[1] // 2, *size))
    image.save(path, quality=95)


def pairs(part, seed=0):
    """(label, number) of the images of a part, in the disorder that original lists have."""
    first = {"test": 100, "val": 50}.get(part, 0)
    found = [(label, first + number) for label in range(3) for number in range(SIZES[part])]
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_food101(root):
    folder = root / "food-101"
    for part, name in (("trainval", "train"), ("test", "test")):
        listed = {food: [] for food in reversed(CLASSES)}
        for label, number in pairs(part):
            listed[CLASSES[label]].append(f"{CLASSES[label]}/{number}")
            picture(folder / "images" / CLASSES[label] / f"{number}.jpg", label, number)
        write_lines(folder / "meta" / f"{name}.txt", [image for images in listed.values() for image in images])
        (folder / "meta" / f"{name}.json").write_text(json.dumps(listed))


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes alike, as Python 2 did; arrays come from numpy.core."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, obj):
        content = obj.encode("latin1") if isinstance(obj, str) else bytes(obj)
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(obj)

    dispatch[str] = dispatch[bytes] = save_text


def pickled(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(content)
    path.write_bytes(stream.getvalue().replace(b"cnumpy._core.", b"cnumpy.core."))


def flat_images(labels, side, channels=3):
    """uint8 (N, channels, side, side) of the labels' colours."""
    images = np.zeros((len(labels), channels, side, side), np.uint8)
    images[:, 0] = np.array([shade(label) for label in labels]).reshape(-1, 1, 1)
    images[:, :, 0, 1:] += 7  # the first row is brighter from its second pixel on, so that a transposed one shows
    return images


def write_cifar(folder, files, labels_key, meta, names_key):
    for file, labels in files.items():
        content = {"batch_label": "of a test", "data": flat_images(labels, 32).reshape(len(labels), -1)}
        pickled(folder / file, {**content, labels_key: labels, "filenames": [f"{n}.png" for n in range(len(labels))]})
    pickled(folder / meta, {names_key: CLASSES, "num_vis": 3072})


def write_cifar10(root):
    labels = [label for label, _ in pairs("trainval")]
    files = {f"data_batch_{number + 1}": labels[number * 6 : number * 6 + 6] for number in range(5)}
    files["test_batch"] = [label for label, _ in pairs("test")]
    write_cifar(root / "cifar-10-batches-py", files, "labels", "batches.meta", "label_names")


def write_cifar100(root):
    files = {"train": [label for label, _ in pairs("trainval")], "test": [label for label, _ in pairs("test")]}
    write_cifar(root / "cifar-100-python", files, "fine_labels", "meta", "fine_label_names")


def write_cub200(root):
    folder = root / "CUB_200_2011"
    names = [f"{label + 1:03d}.{name}" for label, name in enumerate(CLASSES)]
    rows = [(*pair, training) for part, training in (("trainval", 1), ("test", 0)) for pair in pairs(part)]
    files = [f"{names[label]}/{names[label][4:]}_{number:04d}.jpg" for label, number, _ in rows]
    for file, (label, number, _) in zip(files, rows, strict=True):
        picture(folder / "images" / file, label, number)
    write_lines(folder / "images.txt", [f"{i} {file}" for i, file in enumerate(files, 1)])
    write_lines(folder / "image_class_labels.txt", [f"{i} {row[0] + 1}" for i, row in enumerate(rows, 1)])
    write_lines(folder / "train_test_split.txt", [f"{i} {row[2]}" for i, row in enumerate(rows, 1)])
    write_lines(folder / "classes.txt", [f"{label + 1} {name}" for label, name in enumerate(names)])


def write_sun397(root):
    folder, names = root / "SUN397", ["a/abbey", "a/apartment_building/outdoor", "z/zoo"]
    write_lines(folder / "ClassName.txt", [f"/{name}" for name in names])
    for part, name in (("trainval", "Training"), ("test", "Testing")):
        for partition in range(1, 11):
            files = [f"/{names[label]}/sun_{number:04d}.jpg" for label, number in pairs(part, partition)]
            # other partitions test on other images
            files = files if partition == 1 else files[: -partition // 2]
            write_lines(folder / "Partitions" / f"{name}_{partition:02d}.txt", files)
        for label, number in pairs(part):
            picture(folder / names[label] / f"sun_{number:04d}.jpg", label, number)


def write_stanford_cars(root):
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True, exist_ok=True)
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    for part, images in (("trainval", "cars_train"), ("test", "cars_test")):
        rows = [(1, 1, 9, 9, label + 1, f"{i:05d}.jpg") for i, (label, _) in enumerate(pairs(part), 1)]
        annotations = np.array(rows, dtype=[(field, object) for field in fields])
        for row in rows:
            picture(folder / images / row[-1], row[-2] - 1)
        train, test = folder / "devkit" / "cars_train_annos.mat", folder / "cars_test_annos_withlabels.mat"
        savemat(train if part == "trainval" else test, {"annotations": annotations[None]})
    unlabelled = np.array([(*row[:4], row[-1]) for row in rows], dtype=[(f, object) for f in fields if f != "class"])
    savemat(folder / "devkit" / "cars_test_annos.mat", {"annotations": unlabelled[None]})
    savemat(
        folder / "devkit" / "cars_meta.mat", {"class_names": np.array([["Auk 1844", "Dodo 1662", "Moa 1445"]], object)}
    )


def write_fgvc_aircraft(root):
    folder, names = root / "fgvc-aircraft-2013b" / "data", ["707-320", "A300B4", "DH-82 B"]
    write_lines(folder / "variants.txt", names)
    for part in ("train", "val", "test"):
        for label, number in pairs(part):
            picture(folder / "images" / f"{label}{number:06d}.jpg", label, number)
    listed = {part: [f"{label}{n:06d} {names[label]}" for label, n in pairs(part)] for part in ("train", "val", "test")}
    for part, rows in {**listed, "trainval": listed["val"] + listed["train"]}.items():
        write_lines(folder / f"images_variant_{part}.txt", rows)


def write_voc2007_classification(root, folder="VOCdevkit/VOC2007"):
    folder = root / folder
    listed = {}
    for part in ("train", "val", "test"):
        for label, number in pairs(part):
            # one object of the image's own class, and of others by its number, some difficult only
            objects = [(VOC_CLASSES[label], 0), (VOC_CLASSES[label], 1)]
            objects += [(VOC_CLASSES[5 + number % 3], number % 2), ("person", 1)][: number % 3]
            name = f"{label}{number:05d}"
            listed.setdefault(part, {})[name] = objects
            picture(folder / "JPEGImages" / f"{name}.jpg", label, number, (20, 16))
            xml = "".join(
                f"<object><name>{what}</name><difficult>{flag}</difficult><bndbox><xmin>1</xmin><ymin>1</ymin>"
                "<xmax>9</xmax><ymax>8</ymax></bndbox></object>"
                for what, flag in objects
            )
            write_lines(
                folder / "Annotations" / f"{name}.xml",
                [f"<annotation><size><width>20</width><height>16</height></size>{xml}</annotation>"],
            )
    for part, images in {**listed, "trainval": {**listed["val"], **listed["train"]}}.items():
        lists = folder / "ImageSets" / "Main"
        write_lines(lists / f"{part}.txt", images)
        for what in VOC_CLASSES:
            flags = {name: [flag for one, flag in objects if one == what] for name, objects in images.items()}
            rows = [f"{name} {-1 if not found else 0 if all(found) else 1:2d}" for name, found in flags.items()]
            write_lines(lists / f"{what}_{part}.txt", rows)


def write_dtd(root):
    folder = root / "dtd" / "dtd"
    for part in ("train", "val", "test"):
        for label, number in pairs(part):
            picture(folder / "images" / CLASSES[label] / f"{CLASSES[label]}_{number:04d}.jpg", label, number)
    # the partitions hand the same images round
    parts = ["train", "val", "test"]
    for partition in range(1, 11):
        for place, part in enumerate(parts):
            rows = pairs(parts[(place + partition - 1) % 3])
            files = [f"{CLASSES[label]}/{CLASSES[label]}_{number:04d}.jpg" for label, number in rows]
            write_lines(folder / "labels" / f"{part}{partition}.txt", files)


def write_oxford_pets(root):
    folder = root / "oxford-iiit-pet"
    for part in ("trainval", "test"):
        rows = []
        for label, number in pairs(part):
            rows.append(f"{CLASSES[label]}_{number} {label + 1} {1 + label % 2} 1")
            picture(folder / "images" / f"{CLASSES[label]}_{number}.jpg", label, number)
        write_lines(folder / "annotations" / f"{part}.txt", rows)


def write_caltech101(root):
    for label, name in enumerate([*sorted(CLASSES), "BACKGROUND_Google"]):
        for number in range(CALTECH + label):
            path = root / "caltech101" / "101_ObjectCategories" / name / f"image_{number + 1:04d}.jpg"
            picture(path, label if label < 3 else 5, number)


def write_flowers102(root):
    folder = root / "flowers-102"
    numbers, labels, key = {}, [], {"train": "trnid", "val": "valid", "test": "tstid"}
    for part, name in key.items():
        numbers[name] = []
        for label, number in pairs(part):
            labels.append(label + 1)
            numbers[name].append(len(labels))
            picture(folder / "jpg" / f"image_{len(labels):05d}.jpg", label, number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(folder / "setid.mat", {name: np.array([of], np.uint16) for name, of in numbers.items()})


def write_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True, exist_ok=True)
    for part, name in (("trainval", "train"), ("test", "test")):
        labels = [label for label, _ in pairs(part)]
        # columns before rows
        (folder / f"{name}_X.bin").write_bytes(flat_images(labels, 96).transpose(0, 1, 3, 2).tobytes())
        (folder / f"{name}_y.bin").write_bytes(bytes(label + 1 for label in labels))
    (folder / "unlabeled_X.bin").write_bytes(flat_images(range(6), 96).transpose(0, 1, 3, 2).tobytes())
    write_lines(folder / "class_names.txt", CLASSES)


def write_fashion_mnist(root):
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    for part, name in (("trainval", "train"), ("test", "t10k")):
        labels = [label for label, _ in pairs(part)]
        images = flat_images(labels, 28, channels=1)
        for what, dimensions, data in (("images", (len(labels), 28, 28), images), ("labels", (len(labels),), labels)):
            header = bytes((0, 0, 8, len(dimensions))) + struct.pack(f">{len(dimensions)}i", *dimensions)
            file = folder / f"{name}-{what}-idx{len(dimensions)}-ubyte"
            file.write_bytes(header + np.asarray(data, np.uint8).tobytes())


def write_imagenet(root):
    for part, name in (("trainval", "train"), ("test", "val")):
        for label, number in pairs(part):
            wnid = WORDNET[label]
            file = f"{wnid}_{number}.JPEG" if name == "train" else f"ILSVRC2012_val_{label}{number:07d}.JPEG"
            picture(root / "imagenet" / name / wnid / file, label, number)


def write_coco_detection(root):
    """Three images to train on and two to test on, of 20 x 16; as in the original, a box of train2017 has no height."""
    folder, box = root / "coco", {"category_id": 1, "iscrowd": 0, "area": 72}
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in (("train2017", 3), ("val2017", 2)):
        boxes = [{"id": n, "image_id": n // 2, "bbox": [1, 2, 8, 4 + n], **box} for n in range(count)]
        if split == "train2017":
            boxes.append({"id": 918, "image_id": 2, "bbox": [9.65, 8.33, 1.03, 0.0], **box})
        for number in range(count):
            picture(folder / split / f"{number:012d}.jpg", 0, number, (20, 16))
        images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 20, "height": 16} for n in range(count)]
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


#: the writers by the names of the sets
WRITERS = {name.removeprefix("write_"): write for name, write in globals().items() if name.startswith("write_")}
del WRITERS["lines"], WRITERS["cifar"], WRITERS["coco_detection"]  # the last is no classification set


def sizes_of(name):
    """Return the number of images of a small set by official part."""
    if name == "caltech101":
        return {"trainval": 90, "test": 3 * (CALTECH - 30) + 3}
    own_val = name in ("fgvc_aircraft", "voc2007_classification", "dtd", "flowers102")
    parts = ("train", "val", "test") if own_val else ("trainval", "test")
    return {**{part: 3 * SIZES[part] for part in parts}, **({"unlabeled": 6} if name == "stl10" else {})}


def accept_small_copies(monkeypatch):
    """Let torchvision read small sets, whose files do not have the checksums of the originals."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.setattr("torchvision.datasets.Flowers102._check_integrity", lambda self: True)
