"""Small zoo entries: real ones of a small ResNet, and drafts of a few bytes for tests of stores."""

import hashlib
import json
import random
import tempfile
from pathlib import Path

from bissl_zoo.zoo.stores import Draft, open_store


def publish_tiny(zoo, name="tiny", seed=0, config="train: {}\n", pretext_head=None, **metadata):
    """Publish a small ResNet with the random weights of `seed` and the given metadata."""
    import timm
    import torch

    from bissl_zoo.zoo import publish_entry

    torch.manual_seed(seed)
    return publish_entry(
        name=name,
        backbone_state=timm.create_model("test_resnet", num_classes=0).state_dict(),
        architecture="test_resnet",
        pretrained_cfg={"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 64, 64]},
        metadata=metadata,
        train_config_text=config,
        pretext_head_state=pretext_head,
        zoo=zoo,
    )


def publish_draft(zoo, name="tiny", seed=0, once=False):
    """Publish an entry with a few random bytes as weights, without torch; return its name."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "model.safetensors").write_bytes(random.Random(seed).randbytes(2000))
        (folder / "train_config.yaml").write_text("train: {}\n")

        def complete(final):
            (folder / "entry.json").write_text(f'{{"format": 1, "name": "{final}"}}')
            files = {
                path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
                for path in folder.iterdir()
            }
            return {"architecture": "test_resnet", "files": files}

        return open_store(zoo).publish(Draft(name, folder, complete, once))


def edit_index(zoo, edit):
    """Call `edit` with the content of the index of a folder, and write it back."""
    content = json.loads((zoo / "index.json").read_text())
    edit(content)
    (zoo / "index.json").write_text(json.dumps(content))


def replace_file(zoo, name, file, content):
    """Replace the bytes of a file of an entry, and its size and digest in the index."""
    (zoo / name / file).write_bytes(content)
    record = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    edit_index(zoo, lambda index: index["entries"][name]["files"].update({file: record}))
