"""Post the pictures of a folder to `ttt-adapt serve` as one stream, and keep the predictions beside them.

ttt-adapt serve --checkpoint model.safetensors &
python examples/serve_client.py http://127.0.0.1:8000 FOLDER
"""

import os
import sys
from pathlib import Path

import httpx

address, folder = sys.argv[1], Path(sys.argv[2])
token = os.environ.get("TTT_ADAPT_TOKEN", "none")
with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
    client.post("/v1/streams", json={"name": folder.name}).raise_for_status()
    for picture in sorted(folder.glob("*.png")):
        kind = {"Content-Type": "image/png"}
        answer = client.post(f"/v1/streams/{folder.name}/frames", content=picture.read_bytes(), headers=kind)
        answer.raise_for_status()
        picture.with_suffix(".labels.png").write_bytes(answer.content)
        print(f"{picture.name}: frame {answer.headers['TTT-Frame']}, adapted: {answer.headers['TTT-Adapted']}")
