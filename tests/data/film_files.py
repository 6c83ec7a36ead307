"""Film files of every kind, written byte by byte where no library at hand writes them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate


def as_file(image, kind, **options):
    """The bytes of a PIL image or an array as a file that Pillow writes."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def as_png(depth, colour, rows, *, size=None):
    """A PNG file of any depth and kind of colour, from its bytes (height, ...); `size` is what it says of itself."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", *(size or (rows.shape[1], len(rows))), depth, colour, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + line.tobytes() for line in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def as_tiff(values, *, big_endian=False, photometric=1, tile=None):
    """An uncompressed TIFF file of one strip, of any numeric type; `tile` adds the tags of a tile of that side."""
    order = ">" if big_endian else "<"
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    pixels += b"\0" * (len(pixels) % 2)
    (height, width), bits = values.shape, values.dtype.itemsize * 8
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height}
    tags |= {279: len(pixels)} | ({322: tile, 323: tile} if tile else {}) | {339: "uif".index(values.dtype.kind) + 1}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return (b"MM" if big_endian else b"II") + struct.pack(f"{order}HI", 42, 8 + len(pixels)) + pixels + directory


def as_dicom(stored, *, bits=None, syntax=uid.ExplicitVRLittleEndian, frame=None, without=(), **tags):
    """The bytes of a DICOM file.

    Args:
        stored: array (rows, columns) of 8 or 16 bits, signed or not.
        bits: stored, of those allocated.
        syntax: pydicom compresses to it where it can.
        frame: a codestream to wrap as it is, for the syntaxes that it can't.
        without: keywords to leave out.
        tags: whatever else the header has, or has differently.
    """
    order = "<" if syntax.is_little_endian else ">"
    film = Dataset()
    film.file_meta = FileMetaDataset()
    film.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian if syntax.is_compressed else syntax
    film.SOPClassUID = film.file_meta.MediaStorageSOPClassUID = uid.ComputedRadiographyImageStorage
    film.SOPInstanceUID = film.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    film.PatientName = "Nobody^Special"
    film.Rows, film.Columns = stored.shape
    film.SamplesPerPixel, film.PhotometricInterpretation = 1, "MONOCHROME2"
    film.BitsAllocated = 8 * stored.dtype.itemsize
    film.BitsStored = bits or film.BitsAllocated
    film.HighBit = film.BitsStored - 1
    film.PixelRepresentation = int(stored.dtype.kind == "i")
    pixels = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
    film.PixelData = pixels + b"\0" * (len(pixels) % 2)
    film["PixelData"].VR = "OB" if stored.dtype.itemsize == 1 else "OW"
    if frame is not None:
        film.file_meta.TransferSyntaxUID = syntax
        film.PixelData = encapsulate([frame])
        film["PixelData"].VR, film["PixelData"].is_undefined_length = "OB", True
    elif syntax.is_compressed:
        film.compress(syntax, generate_instance_uid=False)
    for keyword, value in tags.items():
        setattr(film, keyword, value)
    for keyword in without:
        delattr(film, keyword)
    file = io.BytesIO()
    film.save_as(file, enforce_file_format=True)
    return file.getvalue()


def lossless_jpeg(pixels, bits):
    """A lossless JPEG codestream (ISO/IEC 10918-1 process 14, predictor 1), which no library here writes."""
    values = pixels.astype(int)
    predicted = np.empty_like(values)
    predicted[:, 1:], predicted[1:, 0], predicted[0, 0] = values[:, :-1], values[:-1, 0], 1 << (bits - 1)
    words = []
    for difference in ((values - predicted + 32767) % 65536 - 32767).ravel().tolist():
        size = abs(difference).bit_length()
        words.append(f"{size:05b}")  # the Huffman code of a size is its number in five bits
        if 0 < size < 16:
            words.append(f"{difference if difference > 0 else difference + (1 << size) - 1:0{size}b}")
    stream = "".join(words)
    stream += "1" * (-len(stream) % 8)
    scan = int(stream, 2).to_bytes(len(stream) // 8, "big").replace(b"\xff", b"\xff\x00")
    header = struct.pack(">BHHB", bits, *pixels.shape, 1) + b"\x01\x11\x00"
    codes = b"\x00" + bytes([0, 0, 0, 0, 17] + [0] * 11) + bytes(range(17))
    segments = {0xC3: header, 0xC4: codes, 0xDA: b"\x01\x01\x00\x01\x00\x00"}
    body = b"".join(b"\xff%c" % marker + struct.pack(">H", len(it) + 2) + it for marker, it in segments.items())
    return b"\xff\xd8" + body + scan + b"\xff\xd9"
