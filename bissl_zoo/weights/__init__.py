"""Load weights of other projects (load), read and write files (files), and export backbones (export)."""

#: libraries that a backbone can be exported to
TARGETS = ("timm", "torchvision", "detectron2", "onnx", "export")
