"""Runs on the emulated machine: compile engine folders and run images through them.

    python on_machine.py IMAGES.npz FOLDER... > facts.json

IMAGES holds uint8 ``(N, H, W, 3)`` by folder name. Each folder is compiled where it is and gets ``masks.npy`` beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

import edgeseg
from edgeseg.backends.compile import compile_folder


def main(images: str, *folders: str) -> None:
    facts = {}
    with np.load(images) as given:
        for folder in map(Path, folders):
            engine = compile_folder(folder)
            with edgeseg.load(folder) as segmenter:
                masks = np.stack([segmenter(image) for image in given[folder.name]])
            np.save(folder.parent / f"{folder.name}.npy", masks)
            facts[folder.name] = {
                "int8_share": engine.manifest.precision.mac_share.get("int8", 0.0),
                "device": engine.manifest.device,
            }
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
