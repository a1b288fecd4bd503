"""The demo: all of it, small.

* `demo`: pack, protect onto S3, verify, attack; writes one HTML report.
* `embedded_photos`, `drawings`, `photos`: what it protects and attacks.
"""

from pipelines.demo.job import demo
from pipelines.demo.material import Material, drawings, embedded_photos, photos

__all__ = ["Material", "demo", "drawings", "embedded_photos", "photos"]
