"""The demo: all of it, small.

* `demo`: pack, train, fit, protect onto S3, verify, attack; writes one HTML report.
* `drawings`, `photos`: what it protects and attacks.
"""

from pipelines.demo.job import demo
from pipelines.demo.material import Material, drawings, photos

__all__ = ["Material", "demo", "drawings", "photos"]
