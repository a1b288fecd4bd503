"""XMP packets: rights and descriptions stay, pictures go (ISO 16684-1; IPTC Photo Metadata 2023.1).

A packet is XML of a few kilobytes. One that holds no picture stays as it is, byte for byte.
Otherwise the properties that hold one are taken out, and the rest is written anew.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

NAMESPACE = b"http://ns.adobe.com/xap/1.0/\0"  # before a packet in a JPEG
PROHIBITED = "http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED-AIMLTRAINING"

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_PLUS = "http://ns.useplus.org/ldf/xmp/1.0/"
_TIFF = "http://ns.adobe.com/tiff/1.0/"
_META = "adobe:ns:meta/"
_ROOTS = (f"{{{_META}}}xmpmeta", f"{{{_META}}}xapmeta", f"{{{_RDF}}}RDF")
_ORIENTATION = f"{{{_TIFF}}}Orientation"
_DATA_MINING = f"{{{_PLUS}}}DataMining"
# Thumbnails, embedded pictures, depth maps and sounds, each as text in base 64.
_PICTURES = frozenset(
    f"{{{namespace}}}{name}"
    for namespace, name in (
        ("http://ns.adobe.com/xap/1.0/", "Thumbnails"),
        ("http://ns.adobe.com/xap/1.0/g/img/", "image"),
        ("http://ns.google.com/photos/1.0/image/", "Data"),
        ("http://ns.google.com/photos/1.0/depthmap/", "Data"),
        ("http://ns.google.com/photos/1.0/audio/", "Data"),
    )
)
_LONGEST_VALUE = 2048  # characters of one value; a thumbnail in base 64 does not fit
_PREFIXES = {
    "x": _META,
    "rdf": _RDF,
    "plus": _PLUS,
    "tiff": _TIFF,
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpRights": "http://ns.adobe.com/xap/1.0/rights/",
    "xmpMM": "http://ns.adobe.com/xap/1.0/mm/",
    "dc": "http://purl.org/dc/elements/1.1/",
    "photoshop": "http://ns.adobe.com/photoshop/1.0/",
    "exif": "http://ns.adobe.com/exif/1.0/",
    "Iptc4xmpCore": "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}
_BEGIN = "<?xpacket begin='\ufeff' id='W5M0MpCehiHzreSzNTczkc9d'?>\n"
_END = "\n<?xpacket end='w'?>"


def without_pictures(packet: bytes, *, max_bytes: int) -> bytes:
    """The same packet without what may hold a picture.

    Args:
        packet: XMP packet, as a file holds it.
        max_bytes: Bytes that it may have; one that has more is left out.

    Returns:
        The packet, or b"" if it is no XMP, or too long, or nothing is left of it.
    """
    root = _parse(packet)
    if root is None:
        return b""
    taken_out = _take_out(root)
    kept = _serialize(root) if taken_out else packet
    return kept if len(kept) <= max_bytes else b""


def orientation(packet: bytes) -> int:
    """Orientation, 1 to 8; 1, upright, if the packet states none or something else."""
    found = _property(_parse(packet), _ORIENTATION)
    return int(found) if re.fullmatch("[1-8]", found) else 1


def without_orientation(packet: bytes) -> bytes:
    """The packet for pixels that have been turned upright."""
    root = _parse(packet)
    if root is None or not _property(root, _ORIENTATION):
        return packet
    for element in root.iter():
        element.attrib.pop(_ORIENTATION, None)
        for child in [child for child in element if child.tag == _ORIENTATION]:
            element.remove(child)
    return _serialize(root)


def data_mining(packet: bytes) -> str:
    """The reservation that a packet states, a URI of the PLUS vocabulary; "" if none."""
    return _property(_parse(packet), _DATA_MINING)


def with_data_mining_prohibited(packet: bytes) -> bytes:
    """The packet with a reservation against training of AI and machine learning.

    One that states a reservation already stays as it is, whatever it says: it is the owner's word.

    Args:
        packet: XMP packet; b"" for none, and what cannot be read counts as none.
    """
    root = _parse(packet)
    if root is not None and _property(root, _DATA_MINING):
        return packet
    if root is None:
        root = ElementTree.Element(f"{{{_META}}}xmpmeta")
        ElementTree.SubElement(root, f"{{{_RDF}}}RDF")
    rdf = root if root.tag == f"{{{_RDF}}}RDF" else root.find(f".//{{{_RDF}}}RDF")
    if rdf is None:
        rdf = ElementTree.SubElement(root, f"{{{_RDF}}}RDF")
    description = ElementTree.SubElement(rdf, f"{{{_RDF}}}Description")
    description.set(f"{{{_RDF}}}about", "")
    ElementTree.SubElement(description, _DATA_MINING).text = PROHIBITED
    return _serialize(root)


def _parse(packet: bytes) -> ElementTree.Element | None:
    """The root of a packet; None for what is no XML, or defines entities, which XMP has none of."""
    text = packet.strip(b"\0 \t\r\n")
    if not text or b"<!" in text.replace(b"<!--", b""):
        return None
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, LookupError):
        return None
    return root if root.tag in _ROOTS else None


def _take_out(parent: ElementTree.Element) -> bool:
    """Remove elements and attributes that may hold a picture; whether there were any."""
    found = False
    for name in [n for n, value in parent.attrib.items() if _is_picture(n, value)]:
        del parent.attrib[name]
        found = True
    for child in list(parent):
        text = "".join((child.text or "", child.tail or "")).strip()
        if _is_picture(child.tag, text):
            parent.remove(child)
            found = True
        else:
            found |= _take_out(child)
    return found


def _is_picture(name: str, value: str) -> bool:
    return name in _PICTURES or len(value) > _LONGEST_VALUE


def _property(root: ElementTree.Element | None, name: str) -> str:
    """Value of a simple property, as an element or an attribute; "" if there is none."""
    for element in root.iter() if root is not None else ():
        if element.tag == name:
            return (element.text or element.get(f"{{{_RDF}}}resource") or "").strip()
        if name in element.attrib:
            return element.attrib[name].strip()
    return ""


def _serialize(root: ElementTree.Element) -> bytes:
    for prefix, namespace in _PREFIXES.items():
        ElementTree.register_namespace(prefix, namespace)
    return (_BEGIN + ElementTree.tostring(root, encoding="unicode") + _END).encode()
