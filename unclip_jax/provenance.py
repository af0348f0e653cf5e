"""What is written into an image file so that the image is known as generated, by people and by programs.

The mark is the property "digital source type" of the IPTC Photo Metadata Standard (2023.1), in an XMP packet: the value
`trainedAlgorithmicMedia` stands for "created by an algorithm that was trained on sampled content". Editors keep it,
and sites that label generated images look for it.
"""

import importlib.metadata

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
# The keyword under which XMP stands in a PNG's text (XMP specification, part 3, section 1.1.5).
KEYWORD = "XML:com.adobe.xmp"
_LIBRARIES = ("unclip_jax", "jax", "jaxlib", "flax", "numpy")

_PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    f"<Iptc4xmpExt:DigitalSourceType>{SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>"
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


def marks(software: str) -> dict[str, str]:
    """Returns keyword -> text for the text chunks of a PNG: what made it, and that it was generated."""
    return {"Software": software, KEYWORD: _PACKET}


def versions() -> dict[str, str]:
    """Returns library -> version, of the libraries that an image depends on."""
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            found[library] = "unknown"
    return found
