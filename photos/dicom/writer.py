"""Writes what was found in a DICOM object as DICOM; `photos.dicom.process` runs it.

Reads the source object, a JSON document (see `photos.archived`), and the pixels of each object
that is wanted, each with its length before it. Writes a line of JSON with the lengths of the
objects, and then the objects. Exit code: as of `photos.dicom.decoder`.

All of them belong to the source's study and patient, and refer to it. Their identifiers follow from
the source's bytes and from all that was asked for, so that an archive to which the same answer is
sent again keeps one.
"""

import copy
import json
import sys
import uuid
from io import BytesIO
from typing import Any

import highdicom as hd
import numpy as np
from highdicom import sr
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileDataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from photos.dicom.header import Header, Refusal, header, parsed
from photos.processes.child import NO_MEMORY, limit, taken, told

__all__ = ["main"]

# Bytes of memory beyond copies of the source, and for each pixel: a byte for each, and copies.
_OTHER_BYTES = 256 << 20
_COPIES = 6
_PIXEL_BYTES = 24

_NAMESPACE = uuid.UUID("6b0f1e0c-8e55-5b52-9c3d-2a6d4b0f6c1e")

_MAKER = "SLSNet"
_DEVICE = "SLSNet Server"


def _load_tables() -> None:
    """Let highdicom read the standard's tables, which it puts off until it first needs them.

    That takes half a second, and processes that are forked after it have them.
    """
    photo = Dataset()
    photo.SOPClassUID = SecondaryCaptureImageStorage
    photo.Manufacturer = _MAKER
    hd.ContributingEquipment.for_image_acquisition(photo)


_load_tables()

# Series that hold results come after those of cameras.
_SERIES = {"seg": 9001, "probability": 9002, "overlay": 9003, "sr": 9004}

# Attributes of patient and study that have to be there, though they may be empty (type 2).
_MAY_BE_EMPTY = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)

# Results keep these, and are in UTF-8 if the photo has another, or several, which highdicom takes
# in some of the ways only that cameras write.
_CHARACTER_SETS = {
    one.value for one in hd.SpecificCharacterSetValues if not one.value.startswith("ISO 2022")
}

_MEASURES = {
    "area": codes.SCT.Area,
    "perimeter": codes.SCT.Perimeter,
    "diameter": codes.SCT.Diameter,
    "major_axis": codes.SCT.MajorAxis,
    "minor_axis": codes.SCT.MinorAxis,
}

_UNITS = {
    "mm": codes.UCUM.Millimeter,
    "mm2": codes.UCUM.SquareMillimeter,
    "pixels": Code("{pixels}", "UCUM", "pixels"),
}

# The standard has no code for it.
_EXPECTED_JACCARD = Code("EXPECTED-JACCARD", "99SLSNET", "Expected Jaccard index")
_SCHEME = CodingSchemeIdentificationItem(
    "99SLSNET", name="SLSNet Server's own codes", responsible_organization=_MAKER
)

# A photo shows a surface. But highdicom reads no size of pixels without a thickness, and the
# standard allows no zero.
_THICKNESS_MM = 0.001

# Those of the other frames; and highdicom would look for planes in space, which photos do not have.
_NOT_OF_PHOTOS = (
    "PixelData",
    "NumberOfFrames",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    "FrameOfReferenceUID",
)


def main() -> int:
    """Write the objects; return the exit code."""
    cpu_s = int(sys.argv[1])
    data, said = taken(), json.loads(taken())
    pixels = {name: taken() for name in said["pixels"]}
    memory = _OTHER_BYTES + _COPIES * (len(data) + sum(map(len, pixels.values())))
    limit(memory + _PIXEL_BYTES * said["width"] * said["height"], cpu_s)
    try:
        dataset = parsed(data)
        found = header(dataset, said["frame"])
        results = Results(_reference(dataset), found, said, pixels)
        objects = [_bytes(results.made(name)) for name in said["objects"]]
    except MemoryError:
        return NO_MEMORY
    except Refusal as refusal:
        told({"refused": str(refusal), "is_kind": refusal.is_kind})
        return 0
    told({"sizes": list(map(len, objects))})
    for written in objects:
        sys.stdout.buffer.write(written)
    sys.stdout.buffer.flush()
    return 0


def _bytes(made: Dataset) -> bytes:
    out = BytesIO()
    made.save_as(out, enforce_file_format=True)
    return out.getvalue()


def _reference(dataset: FileDataset) -> FileDataset:
    """The source without its pixels, as an object of the one frame that was segmented."""
    for keyword in _NOT_OF_PHOTOS:
        if keyword in dataset:
            delattr(dataset, keyword)
    if str(dataset.get("SpecificCharacterSet")) not in _CHARACTER_SETS:
        dataset.decode()
        dataset.SpecificCharacterSet = "ISO_IR 192"
    for keyword in _MAY_BE_EMPTY:
        if dataset.get(keyword) is None:
            setattr(dataset, keyword, "")
    return dataset


class Results:
    """What was found, as DICOM objects.

    Args:
        source: the object that it was found in, as `_reference` gives it.
        found: its header.
        said: the document that came with it.
        pixels: of each object that has any: packed bits, levels, or a PNG.
    """

    def __init__(
        self, source: FileDataset, found: Header, said: dict[str, Any], pixels: dict[str, bytes]
    ) -> None:
        self._source = source
        self._found = found
        self._said = said
        self._pixels = pixels
        self._made: dict[str, Dataset] = {}

    def made(self, name: str) -> Dataset:
        """The object of this name, which is made once."""
        if name not in self._made:
            make = {
                "seg": self._segmentation,
                "probability": self._probability,
                "overlay": self._overlay,
                "sr": self._report,
            }[name]
            self._made[name] = make()
        return self._made[name]

    def _uid(self, name: str) -> str:
        # A report that refers to the segment is another one.
        how = self._has_segment if name == "sr" else ""
        told = f"{self._said['identity']} {name} {how}"
        return f"2.25.{uuid.uuid5(_NAMESPACE, told).int}"

    def _common(self, name: str) -> dict[str, Any]:
        """What all objects say of themselves."""
        model = self._said["model"]
        return {
            "series_instance_uid": self._uid(f"{name} series"),
            "series_number": _SERIES[name],
            "sop_instance_uid": self._uid(name),
            "instance_number": 1,
            "manufacturer": _MAKER,
            "manufacturer_model_name": _DEVICE,
            "software_versions": (
                model["software"],
                f"{model['name']} {model['version']}",
            ),
            "device_serial_number": model["weights_sha256"],
        }

    def _segmentation(self) -> Dataset:
        size = self._found.rows, self._found.columns
        packed = np.frombuffer(self._pixels["seg"], np.uint8).reshape(size[0], -1)
        return self._segmented("seg", np.unpackbits(packed, axis=1, count=size[1]), "BINARY")

    def _probability(self) -> Dataset:
        size = self._found.rows, self._found.columns
        levels = np.frombuffer(self._pixels["probability"], np.uint8).reshape(size)
        return self._segmented("probability", levels.astype(np.float32) / 255, "FRACTIONAL")

    def _segmented(self, name: str, lesion: NDArray[Any], kind: str) -> Dataset:
        model, quality = self._said["model"], self._said["quality"]
        algorithm = hd.AlgorithmIdentificationSequence(
            name=model["name"],
            family=codes.cid7162.ArtificialIntelligence,
            version=model["version"],
            source=_MAKER,
            parameters=self._parameters(),
        )
        segment = hd.seg.SegmentDescription(
            segment_number=1,
            segment_label="Lesion",
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Lesion,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            tracking_uid=self._uid("lesion"),
            tracking_id="Lesion",
            anatomic_regions=[codes.SCT.Skin],
            # Bluish green, as overlays have it.
            display_color=hd.color.CIELabColor.from_rgb(0, 235, 200),
        )
        if quality is not None:
            segment.SegmentDescription = (
                f"Expected Jaccard {quality['jaccard']:.3f} ({quality['grade']}): what masks like"
                " this one have with an annotator's, on average"
            )
        # highdicom would take a frame of several for a plane in space.
        one = copy.deepcopy(self._source)
        one.SOPClassUID = SecondaryCaptureImageStorage
        # It is taken from wherever the photo has it.
        if "PixelSpacing" in one:
            del one.PixelSpacing
        spacing = self._found.spacing
        measures = spacing and hd.PixelMeasuresSequence(spacing, slice_thickness=_THICKNESS_MM)
        made = hd.seg.Segmentation(
            source_images=[one],
            pixel_array=lesion,
            segmentation_type=kind,
            segment_descriptions=[segment],
            pixel_measures=measures,
            content_label="LESION" if name == "seg" else "PROBABILITY",
            content_description=f"Skin lesion by {_MAKER}: {name}",
            series_description=f"{_MAKER} {'mask' if name == 'seg' else name}",
            omit_empty_frames=False,
            **self._common(name),
        )
        self._turn_as_source(made)
        self._refer_to_source(made)
        return made

    def _turn_as_source(self, made: Dataset) -> None:
        """Say how the patient lies in the picture; empty where the photo does not."""
        made.PatientOrientation = self._source.get("PatientOrientation") or ""

    def _parameters(self) -> dict[str, str]:
        told = {
            "weights_sha256": self._said["model"]["weights_sha256"],
            "threshold": f"{self._said['threshold']:g}",
            "clean": str(self._said["clean"]).lower(),
        }
        if self._said["quality"] is not None:
            told["expected_jaccard"] = f"{self._said['quality']['jaccard']:.3f}"
        return told

    def _refer_to_source(self, made: Dataset) -> None:
        """Say of what kind the source is, and which of its frames is meant if it has several."""
        (groups,) = made.PerFrameFunctionalGroupsSequence
        (derivation,) = groups.DerivationImageSequence
        images = (*made.SourceImageSequence, *derivation.SourceImageSequence)
        (series,) = made.ReferencedSeriesSequence
        for reference in (*images, *series.ReferencedInstanceSequence):
            reference.ReferencedSOPClassUID = self._source.SOPClassUID
        if self._found.frames > 1:
            for image in images:
                image.ReferencedFrameNumber = self._found.frame

    def _overlay(self) -> Dataset:
        drawn = np.asarray(Image.open(BytesIO(self._pixels["overlay"])).convert("RGB"))
        common = self._common("overlay")
        shrunk = self._found.columns / drawn.shape[1]
        spacing = self._found.spacing
        made = hd.sc.SCImage.from_ref_dataset(
            self._source,
            pixel_array=drawn,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("L", "F"),
            series_description=f"{_MAKER} overlay",
            transfer_syntax_uid=ExplicitVRLittleEndian,
            pixel_spacing=spacing and tuple(shrunk * mm for mm in spacing),
            **common,
        )
        self._turn_as_source(made)
        made.Laterality = self._source.get("Laterality") or ""
        made.ImageType = ["DERIVED", "SECONDARY"]
        made.BurnedInAnnotation = "NO"
        made.DerivationDescription = f"Outline of the lesion by {_MAKER}, drawn on the photo"
        made.SourceImageSequence = [self._source_reference()]
        return made

    def _source_reference(self) -> Dataset:
        reference = Dataset()
        reference.ReferencedSOPClassUID = self._source.SOPClassUID
        reference.ReferencedSOPInstanceUID = self._source.SOPInstanceUID
        if self._found.frames > 1:
            reference.ReferencedFrameNumber = self._found.frame
        reference.PurposeOfReferenceCodeSequence = [
            sr.CodedConcept.from_code(codes.DCM.SourceImageForImageProcessingOperation)
        ]
        return reference

    def _report(self) -> Dataset:
        device = sr.DeviceObserverIdentifyingAttributes(
            uid=f"2.25.{_NAMESPACE.int}",
            name=_DEVICE,
            manufacturer_name=_MAKER,
            model_name=_DEVICE,
        )
        context = sr.ObservationContext(
            observer_device_context=sr.ObserverContext(codes.DCM.Device, device)
        )
        report = sr.MeasurementReport(
            observation_context=context,
            procedure_reported=codes.SCT.ImagingProcedure,
            imaging_measurements=[self._measurements()],
        )
        evidence: list[Dataset] = [self._source]
        if self._has_segment:
            evidence.append(self.made("seg"))
        return sr.ComprehensiveSR(
            evidence=evidence,
            content=report,
            is_complete=True,
            series_description=f"{_MAKER} measurements",
            coding_schemes=[_SCHEME],
            **self._common("sr"),
        )

    @property
    def _has_segment(self) -> bool:
        """Whether the report can refer to the segmentation: both are asked for, and it has one."""
        return "seg" in self._said["objects"] and bool(self._said["measures"])

    def _measurements(
        self,
    ) -> (
        sr.PlanarROIMeasurementsAndQualitativeEvaluations | sr.MeasurementsAndQualitativeEvaluations
    ):
        """Measures of the lesion (TID 1410), or of a photo without one (TID 1501)."""
        model, said = self._said["model"], self._said
        common: dict[str, Any] = {
            "tracking_identifier": sr.TrackingIdentifier(self._uid("lesion"), "Lesion"),
            "finding_type": codes.SCT.Lesion,
            "finding_sites": [sr.FindingSite(codes.SCT.Skin)],
            "algorithm_id": sr.AlgorithmIdentification(
                name=model["name"],
                version=model["version"],
                parameters=[f"{name}={value}" for name, value in self._parameters().items()],
            ),
        }
        measures = [
            sr.Measurement(_MEASURES[name], value, _UNITS[unit])
            for name, (value, unit) in said["measures"].items()
        ]
        if said["quality"] is not None:
            jaccard = said["quality"]["jaccard"]
            measures.append(sr.Measurement(_EXPECTED_JACCARD, jaccard, codes.UCUM.NoUnits))
        frames = [self._found.frame] if self._found.frames > 1 else None
        source = self._source.SOPClassUID, self._source.SOPInstanceUID
        if not said["measures"]:
            return sr.MeasurementsAndQualitativeEvaluations(
                measurements=measures,
                source_images=[sr.SourceImageForMeasurementGroup(*source, frames)],
                **common,
            )
        if self._has_segment:
            segmentation = self.made("seg")
            segment = sr.ReferencedSegmentationFrame(
                segmentation.SOPClassUID,
                segmentation.SOPInstanceUID,
                frame_number=1,
                segment_number=1,
                source_image=sr.SourceImageForSegmentation(*source, frames),
            )
            # Of frame and segment the standard wants one (PS3.3, table 10-3).
            del segment[0].ReferencedSOPSequence[0].ReferencedFrameNumber
            where: dict[str, Any] = {"referenced_segment": segment}
        else:
            outline = np.array([*said["outline"], said["outline"][0]], np.float32)
            where = {
                "referenced_region": sr.ImageRegion(
                    sr.GraphicTypeValues.POLYLINE,
                    outline,
                    sr.SourceImageForRegion(*source, frames),
                )
            }
        return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
            measurements=measures, **where, **common
        )
