"""The documented trees of the datasets in miniature: which files lie where, and what must become of them."""

import dataclasses
import json
import os
import pathlib

import cv2
import numpy as np
import pytest

DATA = pathlib.Path(os.environ.get("ULTRASOUND_DATA", pathlib.Path(__file__).parents[3] / "shared" / "ultrasound"))
_IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".bmp")


@dataclasses.dataclass
class Tree:
    """Paths of frames with what is known about them (label by name), of other files, and tables with their text."""

    frames: dict[str, dict[str, str]]
    others: list[str] = dataclasses.field(default_factory=list)
    tables: dict[str, str | list] = dataclasses.field(default_factory=dict)
    optional: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    folds: dict[str, set[tuple[str, str, str]]] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)


def real_folder(*parts):
    """A public dataset beside the project, or where ULTRASOUND_DATA says; the test is skipped elsewhere."""
    folder = DATA.joinpath(*parts)
    if not folder.is_dir():
        pytest.skip(f"needs the public dataset {parts[0]}; ULTRASOUND_DATA names the folder that holds it")
    return folder


def grow(tree, root):
    """Writes a tree below `root`, with the litter that archives bring along beside its first frame."""
    first = next(iter(tree.frames))
    folder, name = "".join(first.rpartition("/")[:2]), first.rpartition("/")[2]
    litter = [f"__MACOSX/{folder}._{name}", f"{folder}._{name}", f"{folder}Thumbs.db", f"{folder}.DS_Store"]
    masks = [known["mask"] for known in tree.frames.values() if known.get("mask")]
    switched = [path for paths in tree.optional.values() for path in paths]
    for number, path in enumerate([*tree.frames, *masks, *tree.others, *switched, *litter]):
        _place(root / path, _content(path, number))
    for path, text in tree.tables.items():
        if isinstance(text, list):
            _write_xlsx(root / path, text)
        else:
            _place(root / path, text.encode())
    return root


def _place(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _content(path, number):
    suffix = path[path.rfind(".") :].lower()
    if suffix not in _IMAGES:
        return b"placeholder"
    pixels = np.random.default_rng(number).integers(0, 256, (16, 24), dtype=np.uint8)
    return cv2.imencode(suffix, pixels)[1].tobytes()


def _write_xlsx(path, rows):
    import openpyxl

    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)


def coco(images, categories=((1, "lmym"), (2, "GIST"))):
    """COCO text with one annotation per image, given as (file name, category number)."""
    return json.dumps(
        {
            "images": [{"id": number, "file_name": name} for number, (name, _) in enumerate(images)],
            "annotations": [
                {"id": number, "image_id": number, "category_id": category, "segmentation": [], "bbox": [0, 0, 1, 1]}
                for number, (_, category) in enumerate(images)
            ],
            "categories": [{"id": number, "name": name} for number, name in categories],
        }
    )


def ddti(tirads, *marks):
    """XML of a patient of DDTI: images by number, each with the corners of one polygon or None."""

    def svg(corners):
        points = [{"x": x, "y": y} for x, y in corners or ()]
        return json.dumps([{"points": points, "annotation": {}, "regionType": "freehand"}]) if corners else ""

    text = "".join(f"<mark><image>{number}</image><svg>{svg(corners)}</svg></mark>" for number, corners in marks)
    return f"<case><number>1</number><age>40</age><sex>F</sex><tirads>{tirads}</tirads>{text}</case>"


_CORNERS = ((4, 4), (19, 4), (19, 11), (4, 11))
_BUSI = "Dataset_BUSI_with_GT"
_DDTI = "DDTI/2_preprocessed_data/stage1"
_UMUD = "{}_new_model_v1"
_ROI = "usd514-db/usd514_jpeg_roi"
_FETUS = "Ultrasound Fetus Dataset/Ultrasound Fetus Dataset/Data/Data"
_UCLM = "BUS-UCLM Breast ultrasound lesion segmentation dataset"
_AOP = "Pubic Symphysis-Fetal Head Segmentation and Angle of Progression"
_MICRO = "Micro_Ultrasound_Prostate_Segmentation_Dataset"
_CAROTID = "Common Carotid Artery Ultrasound Images"
_MUSCLE = "Polito-Radboud-DeepLearningUS"
_ECHO = "pediatric_echo_avi/pediatric_echo_avi"
_KIDNEY = "kidneyUS_images_14_june_2022"
_SEGTHY = "US_volunteer_dataset/ground_truth_data"

#: By name of the dataset, and a word for layouts that are not the first.
TREES = {
    "us105": Tree(
        {"105 US Images/001.png": {"frame": "001", "patient": "", "mask": "105 US Masks/001 G man.png"}},
        ["readme.txt", "105 US Masks/002 G man.png"],
    ),
    "abdomen_us": Tree(
        {
            "abdominal_US/RUS/images/test/img_a.jpg": {"frame": "RUS/test/img_a", "split": "test"},
            "abdominal_US/RUS/images/train/img_a.png": {"frame": "RUS/train/img_a", "split": "train"},
        },
        ["abdominal_US/RUS/annotations/test/img_a.png"],
        optional={"simulated": ["abdominal_US/AUS/images/train/img_b.png"]},
    ),
    "acouslic": Tree(
        {
            "acouslic-ai-train-set/images/stacked_fetal_ultrasound/0a1b-4000.mha": {
                "patient": "7",
                "video": "0a1b-4000",
            },
            "acouslic-ai-train-set/images/stacked_fetal_ultrasound/0a1b-4001.mha": {"patient": "7"},
        },
        ["acouslic-ai-train-set/masks/stacked_fetal_abdomen/0a1b-4000.mha"],
        {
            "acouslic-ai-train-set/circumferences/fetal_abdominal_circumferences_per_sweep.csv": (
                "uuid,subject_id,sweep_1_ac_mm\n0a1b-4000,7,\n0a1b-4001,7,201.5\n"
            )
        },
    ),
    "aul": Tree(
        {
            "Benign/image/194.jpg": {
                "patient": "Benign/194",
                "label": "benign",
                "mask": "Benign/segmentation/mass/194.json",
            },
            "Malignant/image/194.jpg": {"patient": "Malignant/194", "frame": "Malignant/194", "label": "malignant"},
            "Normal/image/1.jpg": {"label": "normal", "mask": ""},
        },
        ["Benign/segmentation/outline/56.json", "Normal/segmentation/liver/1.json"],
    ),
    "blues": Tree(
        {
            "lus_videos/patient_1_L1.mp4": {"patient": "1", "video": "patient_1_L1", "label": "2"},
            "lus_videos/patient_15_R2_2.mp4": {"patient": "15", "video": "patient_15_R2_2", "label": "0"},
        },
        ["sample_video.gif"],
        {"severity.csv": "video_file,Severity Score,A-lines\npatient_1_L1,2.0,yes\npatient_15_R2_2,0.0,no\n"},
    ),
    "bp": Tree(
        {
            "train/1_1.tif": {"patient": "1", "split": "train", "mask": "train/1_1_mask.tif"},
            "train/1_10.tif": {"patient": "1"},
            "test/1.tif": {"patient": "", "split": "test", "mask": ""},
        },
    ),
    "brachial_plexus": Tree(
        {"data/Sonosite/videos/s001.mp4": {"video": "s001"}, "data/Butterfly/videos/b001.mp4": {"video": "b001"}},
        ["data/Sonosite/ac_masks/s001/s001_000.jpg", "data/demo/videos/P_021_09.mp4"],
    ),
    "breast": Tree(
        {
            "BrEaST-Lesions_USG-images_and_masks/case001.png": {
                "patient": "case001",
                "label": "malignant",
                "mask": "BrEaST-Lesions_USG-images_and_masks/case001_tumor.png",
            },
            "BrEaST-Lesions_USG-images_and_masks/case002.png": {"label": "normal", "mask": ""},
        },
        ["BrEaST-Lesions_USG-images_and_masks/case001_other1.png"],
        {
            "BrEaST-Lesions-USG-clinical-data-Dec-15-2023.xlsx": [
                ["CaseID", "Image_filename", "Mask_tumor_filename", "Classification"],
                [1, "case001.png", "case001_tumor.png", "malignant"],
                [2, "case002.png", None, "normal"],
            ]
        },
    ),
    "bus_dataset_b": Tree(
        {"BUS/original/000001.png": {"label": "benign", "mask": "BUS/GT/000001.png"}, "BUS/original/000012.png": {}},
        ["BUS/GT/000002.png"],
        {"BUS/DatasetB.xlsx": [["Image", "Type"], ["000001", "Benign"], [12, "Malignant"]]},
    ),
    "bus_uc": Tree(
        {
            "BUS_UC/Benign/images/001.png": {
                "frame": "Benign/001",
                "label": "benign",
                "mask": "BUS_UC/Benign/masks/001.png",
            },
            "BUS_UC/Malignant/images/001.png": {"frame": "Malignant/001", "label": "malignant"},
        },
        ["BUS_UC/All/images/001.png", "BUS_UC/All/masks/001.png"],
    ),
    "bus_ucml": Tree(
        {
            f"{_UCLM}/images/ALWI_000.png": {
                "patient": "ALWI",
                "label": "benign",
                "mask": f"{_UCLM}/masks/ALWI_000.png",
            },
            f"{_UCLM}/images/ANAT_001.png": {"patient": "ANAT", "frame": "ANAT_001", "label": "normal"},
        },
        [],
        {
            f"{_UCLM}/INFO.csv": (
                "\ufeffImage;Label;Doppler;Marks\nALWI_000.png;Benign;No;No\nANAT_001.png;Normal;No;Yes\n"
            )
        },
    ),
    "bus_bra": Tree(
        {
            "BUSBRA/Images/bus_0001-l.png": {
                "patient": "1",
                "frame": "bus_0001-l",
                "label": "malignant",
                "mask": "BUSBRA/Masks/mask_0001-l.png",
            },
            "BUSBRA/Images/bus_0001-r.png": {"patient": "1", "label": "malignant"},
            "BUSBRA/Images/bus_0002-l.png": {"patient": "2", "label": "benign"},
            "BUSBRA/Images/bus_0003-s.png": {"patient": "3", "label": "benign"},
        },
        ["BUSBRA/Masks/mask_0009-l.png"],
        {
            "BUSBRA/bus_data.csv": (
                "\ufeffID, Case ,Histology,Pathology,BBOX\n"
                'bus_0001-l,1,carcinoma,malignant,"[91,24,103,79]"\n'
                'bus_0001-r,1,carcinoma,malignant,"[1,2,3,4]"\n'
                'bus_0002-l,2,cyst,benign,"[1,2,3,4]"\n'
                'bus_0003-s,3,cyst,benign,"[1,2,3,4]"\n'
            ),
            "BUSBRA/5-fold-cv.csv": (
                "ID,Pathology,kFold,valid_1,valid_2,valid_3\n"
                "bus_0001-l,malignant,1,NaN,1,1\n"
                "bus_0001-r,malignant,1,,1.0,1\n"
                "bus_0002-l,benign,2,0.0,,1\n"
                "bus_0003-s,benign,3,1,0,NaN\n"
            ),
        },
        folds={
            "5-fold-cv": {
                *(("bus_0001-l", fold, part) for fold, part in (("1", "test"), ("2", "train"), ("3", "train"))),
                *(("bus_0001-r", fold, part) for fold, part in (("1", "test"), ("2", "train"), ("3", "train"))),
                *(("bus_0002-l", fold, part) for fold, part in (("1", "validation"), ("2", "test"), ("3", "train"))),
                *(("bus_0003-s", fold, part) for fold, part in (("1", "train"), ("2", "validation"), ("3", "test"))),
            }
        },
        warnings=["no table of folds 10-fold-cv"],
    ),
    "camus_public": Tree(
        {
            "database_nifti/patient0001/patient0001_2CH_half_sequence.nii.gz": {
                "patient": "patient0001",
                "video": "patient0001_2CH",
                "mask": "",
            }
        },
        [
            "database_nifti/patient0001/patient0001_2CH_half_sequence_gt.nii.gz",
            "database_nifti/patient0001/patient0001_2CH_ED_gt.nii.gz",
            "database_nifti/patient0001/Info_2CH.cfg",
        ],
        optional={"key_frames": ["database_nifti/patient0001/patient0001_2CH_ED.nii.gz"]},
    ),
    "cardiac_udc": Tree(
        {
            "cardiacUDC_dataset/Site_G_100/patient-1-4_image.nii.gz": {
                "patient": "Site_G_100/patient-1-4",
                "video": "Site_G_100/patient-1-4",
            }
        },
        ["cardiacUDC_dataset/Site_G_100/patient-1-4_label.nii.gz"],
    ),
    "ccaui": Tree(
        {
            f"{_CAROTID}/US images/202201121748100022VAS_slice_9.png": {
                "video": "202201121748100022VAS",
                "frame": "202201121748100022VAS/9",
                "mask": f"{_CAROTID}/Expert mask images/202201121748100022VAS_slice_9.png",
            },
            f"{_CAROTID}/US images/202201121748100022VAS_slice_1069.png": {},
        },
    ),
    "dfhi": Tree(
        {
            "Trans-thalamic/Trans-thalamic/Patient00168_Plane3_1_of_3.png": {
                "patient": "Patient00168",
                "label": "Trans-thalamic",
            },
            "Diverse Fetal Head Images/Orginal_train_images_to_959_661/010_HC.png": {
                "patient": "010",
                "label": "Diverse Fetal Head Images",
            },
        },
        [
            "Trans-thalamic/Trans-thalamic-Segmentation/SegmentationClass/Patient00168_Plane3_1_of_3.png",
            "Trans-thalamic/Trans-thalamic/Trans-thalamic-Pixel-Size.csv",
        ],
    ),
    "echocp": Tree(
        {
            "EchoCP_dataset/001_r_image.nii.gz": {"patient": "001", "video": "001_r"},
            "EchoCP_dataset/001_v_image.nii.gz": {"patient": "001", "video": "001_v"},
        },
        ["EchoCP_dataset/001_r_label.nii.gz", "echoCP_diagnosis_label.xlsx"],
    ),
    "echonet_dynamic": Tree(
        {
            "EchoNet-Dynamic/Videos/0X100009310A3BD7FC.avi": {"video": "0X100009310A3BD7FC", "split": "train"},
            "EchoNet-Dynamic/Videos/0X2.avi": {"split": "validation"},
            "EchoNet-Dynamic/Videos/0X3.avi": {"split": "test"},
        },
        ["EchoNet-Dynamic/VolumeTracings.csv"],
        {"EchoNet-Dynamic/FileList.csv": "FileName,EF,Split\n0X100009310A3BD7FC,55.1,TRAIN\n0X2,60,VAL\n0X3,61,TEST\n"},
    ),
    "echonet_pediatric": Tree(
        {
            f"{_ECHO}/A4C/Videos/CR32a7555-CR32a7582-000039.avi": {
                "video": "A4C/CR32a7555-CR32a7582-000039",
                "split": "train",
            },
            f"{_ECHO}/PSAX/Videos/CR32a7555-CR32a7582-000039.avi": {"split": "test"},
            f"{_ECHO}/PSAX/Videos/CR3-CR3-000007.avi": {"split": "validation"},
        },
        [f"{_ECHO}/A4C/VolumeTracings.csv"],
        {
            f"{_ECHO}/A4C/FileList.csv": "FileName,EF,Split\nCR32a7555-CR32a7582-000039.avi,61,0\n",
            f"{_ECHO}/PSAX/FileList.csv": (
                "FileName,EF,Split\nCR32a7555-CR32a7582-000039.avi,61,9\nCR3-CR3-000007.avi,6,7\n"
            ),
        },
    ),
    "fallmud": Tree(
        {
            "FALLMUD/NeilCronin/images/img_00001.tif": {"frame": "NeilCronin/img_00001"},
            "FALLMUD/RyanCunningham/images/img_00001.png": {"frame": "RyanCunningham/img_00001"},
        },
        ["FALLMUD/NeilCronin/fascicle_masks/img_00001.png", "FALLMUD/NeilCronin/images/notes.txt"],
    ),
    "fass": Tree(
        {"IMAGES/P01_IMG1.png": {"patient": "P01", "frame": "P01_IMG1"}, "IMAGES/P01_IMG10.png": {"patient": "P01"}},
        ["ARRAY_FORMAT/P01_IMG1.npy"],
    ),
    "fast_u_net": Tree(
        {"AC_image1/0039.png": {"patient": ""}, "AC_image2/inner/fa_0079.png": {"patient": ""}},
        ["AC_mask/0039.png", "HC_mask/141_2HC_Annotation.png", "test_data/1.png"],
        optional={"head": ["HC_image1/141_2HC.png"]},
    ),
    "feft": Tree(
        {"train/Aorta/img1.png": {"label": "Aorta", "patient": ""}, "test/V sign/img1.jpg": {"label": "V sign"}},
        ["train/Aorta/labels.csv"],
    ),
    "fetal_planes_db": Tree(
        {
            "FETAL_PLANES_ZENODO/Images/Patient00001_Plane1_1_of_2.png": {
                "patient": "Patient00001",
                "frame": "Patient00001_Plane1_1_of_2",
                "label": "Other",
                "split": "train",
            },
            "FETAL_PLANES_ZENODO/Images/Patient00002_Plane3_1_of_1.png": {"label": "Fetal brain", "split": "test"},
        },
        ["FETAL_PLANES_ZENODO/README.pdf"],
        {
            "FETAL_PLANES_ZENODO/FETAL_PLANES_DB_data.csv": (
                "Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train \n"
                "Patient00001_Plane1_1_of_2;1;Other;Not A Brain;Op. 1;Voluson E6;1\n"
                "Patient00002_Plane3_1_of_1;2;Fetal brain;Trans-thalamic;Op. 1;Voluson E6;0 \n"
            )
        },
    ),
    "fh_ps_aop": Tree(
        {f"{_AOP}/image_mha/00001.mha": {"frame": "00001", "mask": f"{_AOP}/label_mha/00001.mha"}},
    ),
    "gist514_db": Tree(
        {
            f"{_ROI}/images/0001.jpg": {"frame": "0001", "label": "leiomyoma"},
            f"{_ROI}/images/0002.jpg": {"frame": "0002", "label": "GIST"},
        },
        ["usd514-db/usd514_jpeg_raw/images/0001.jpg", "usd514-db/usd514_jpeg_raw/annotations/val_anno_split_0.json"],
        {
            f"{_ROI}/annotations/all_anno_crop.json": coco([("0001.jpg", 1), ("0002.jpg", 2)]),
            f"{_ROI}/annotations/train_anno_crop_split_0.json": coco([("0001.jpg", 1)]),
            f"{_ROI}/annotations/val_anno_crop_split_0.json": coco([("0002.jpg", 2)]),
            f"{_ROI}/annotations/train_anno_crop_split_1.json": coco([("0002.jpg", 2)]),
            f"{_ROI}/annotations/val_anno_crop_split_1.json": coco([("0001.jpg", 1)]),
        },
        folds={
            "5-fold-cv": {
                ("0001", "0", "train"),
                ("0002", "0", "test"),
                ("0002", "1", "train"),
                ("0001", "1", "test"),
            }
        },
    ),
    "hc": Tree(
        {
            "training_set/141_2HC.png": {
                "patient": "training/141",
                "frame": "training/141_2HC",
                "split": "train",
                "mask": "training_set/141_2HC_Annotation.png",
            },
            "training_set/141_HC.png": {"patient": "training/141", "spacing": (0.25, 0.25)},
            "test_set/141_HC.png": {"patient": "test/141", "split": "test", "mask": "", "spacing": (0.5, 0.5)},
        },
        tables={
            "training_set_pixel_size_and_HC.csv": "filename,pixel size(mm),head circumference (mm)\n"
            "141_HC.png,0.25,200\n141_2HC.png,0.3,201\n",
            "test_set_pixel_size.csv": "filename,pixel size(mm)\n141_HC.png,0.5\n",
        },
    ),
    "jnu_ifm": Tree(
        {
            "us_data/20190830T115515/image/20190830T115515_1.png": {
                "video": "20190830T115515",
                "frame": "20190830T115515/1",
                "label": "only_sp",
                "mask": "us_data/20190830T115515/mask/20190830T115515_1_mask.png",
            },
            "us_data/20190830T115515/image/20190830T115515_2.png": {"label": "sp+head"},
            "us_data/20190901T115515/image/20190901T115515_1.png": {"label": "none"},
        },
        ["us_data/20190830T115515/mask_enhance/20190830T115515_1_mask.png", "us_data/20190830T115515/enhance/1.png"],
        {
            "us_data/20190830T115515/frame_label.csv": "frame_id,frame_label\n1,4\n2,6\n",
            "us_data/20190901T115515/frame_label.csv": "frame_id,frame_label\n1,3\n",
        },
    ),
    "kidney_us": Tree(
        {
            f"{_KIDNEY}/1_IM-0001-0059_anon.png": {"patient": "IM-0001-0059", "frame": "1_IM-0001-0059_anon"},
            f"{_KIDNEY}/2_IM-0001-0059-0003_anon.png": {"patient": "IM-0001-0059-0003"},
        },
        ["labels/reviewed_masks_1/capsule/1_IM-0001-0059_anon.png", "labels/reviewed_labels_1.csv"],
    ),
    "luss_phantom": Tree(
        {"LUSS_phantom/images/a_001.png": {"frame": "a_001", "mask": "LUSS_phantom/masks/a_001.png"}},
    ),
    "micro_seg": Tree(
        {
            f"{_MICRO}/train/micro_ultrasound_scans/microUS_train_01.nii.gz": {
                "patient": "microUS_train_01",
                "split": "train",
            },
            f"{_MICRO}/test/micro_ultrasound_scans/microUS_test_01.nii.gz": {
                "patient": "microUS_test_01",
                "split": "test",
            },
        },
        [f"{_MICRO}/train/expert_annotations/expert_annotation_train_01.nii.gz"],
    ),
    "mmotu_2d": Tree(
        {
            "OTU_2d/images/1.JPG": {
                "frame": "1",
                "label": "Simple cyst",
                "split": "train",
                "mask": "OTU_2d/annotations/1_binary.PNG",
            },
            "OTU_2d/images/2.JPG": {"label": "Chocolate cyst", "split": "test"},
        },
        ["OTU_2d/annotations/1.PNG", "OTU_2d/annotations/1_binary_binary.PNG", "OTU_2d/train.txt"],
        {"OTU_2d/train_cls.txt": "1.JPG  4\n\n", "OTU_2d/val_cls.txt": "2.JPG  0\n"},
    ),
    "mmotu_3d": Tree(
        {"OTU_3d/images/1.JPG": {"frame": "1", "mask": "OTU_3d/annotations/1_binary.PNG"}},
        ["OTU_3d/annotations/1.PNG"],
    ),
    "pocus": Tree(
        {
            "data/pocus_videos/convex/Cov-Atlas+(44).gif": {"label": "COVID-19", "patient": "36"},
            "data/pocus_videos/convex/pneu-radiopaeda.mp4": {"label": "bacterial pneumonia"},
            "data/pocus_images/linear/Reg a.JPG": {"label": "regular", "patient": ""},
        },
        [],
        {
            "data/dataset_metadata.csv": (
                "Filename,Label,Patient ID / Name\nCov-Atlas+(44),COVID-19,36\npneu-radiopaeda,Bacterial pneumonia,70\n"
            )
        },
        optional={"uncertain": ["data/pocus_videos/linear/label_uncertain/Vir_or_Pneu_prospective_file4.mp4"]},
        warnings=["have no patient in"],
    ),
    "porcine": Tree(
        {
            "train_images/a.png": {"frame": "train/a", "split": "train"},
            "val_images/a.png": {"frame": "val/a", "split": "validation"},
        },
        ["train_masks/a.png", "val_masks/a.png", "human_masks/h.png"],
        optional={"human": ["human_images/h.png"]},
    ),
    "psfhs": Tree({"PSFHS/image_mha/03744.mha": {"frame": "03744", "mask": "PSFHS/label_mha/03744.mha"}}),
    "regpro": Tree(
        {
            "train/us_images/case000000.nii.gz": {"patient": "train/case000000", "split": "train"},
            "val/us_images/case000000.nii.gz": {"patient": "val/case000000", "split": "validation"},
        },
        ["train/us_labels/case000000.nii.gz", "train/mr_images/case000000.nii.gz"],
    ),
    "s1": Tree(
        {
            "Data/TrainingDataSet/BreastTumourImages/1.jpg": {"frame": "TrainingDataSet/1", "split": "train"},
            "Data/TestingDataSet/Test-Expanded-BreastTumourImages/1.jpg": {"split": "test"},
        },
        [
            "Data/TrainingDataSet/Expanded-3-channel-Labels/1.png",
            "Data/TestingDataSet/Test-General-1-BreastTumourImages/1.jpg",
        ],
    ),
    "segthy": Tree(
        {f"{_SEGTHY}/US/001_P1_1_left_US.nii": {"patient": "001", "video": "001_P1_1_left"}},
        [f"{_SEGTHY}/US_thyroid_label/001_P1_1_left.nii"],
    ),
    "stmus_nda": Tree(
        {
            f"{_MUSCLE}/BB/Healthy/Images/a_1.png": {
                "frame": "BB/Healthy/a_1",
                "label": "Healthy",
                "mask": f"{_MUSCLE}/BB/Healthy/Masks/a_1.png",
            },
            f"{_MUSCLE}/TA/Pathological/Images/a_1.png": {"label": "Pathological"},
        },
        ["Segmentation_models/data/a_1.png"],
    ),
    "stu_hospital": Tree(
        {"Hospital/Test_Image_1.png": {"frame": "1", "mask": "Hospital/mask_1.png"}, "Hospital/Test_Image_10.png": {}},
    ),
    "thyroid_dataset": Tree(
        {
            "Thyroid Dataset/tn3k/trainval-image/0000.jpg": {
                "frame": "trainval/0000",
                "label": "malignant",
                "split": "train",
                "mask": "Thyroid Dataset/tn3k/trainval-mask/0000.jpg",
            },
            "Thyroid Dataset/tn3k/test-image/0000.jpg": {"frame": "test/0000", "label": "benign", "split": "test"},
            "Thyroid Dataset/tg3k/thyroid-image/0000.jpg": {"label": "", "split": "train"},
            "Thyroid Dataset/DDTI dataset/DDTI/2_preprocessed_data/stage1/p_image/1.PNG": {
                "mask": "Thyroid Dataset/DDTI dataset/DDTI/2_preprocessed_data/stage1/p_mask/1.PNG"
            },
        },
        ["Thyroid Dataset/DDTI dataset/DDTI/1_or_data/image/1.PNG"],
        {
            "Thyroid Dataset/tn3k/label4trainval.csv": "0000.jpg,1\n",
            "Thyroid Dataset/tn3k/label4test.csv": "0000.jpg,0\n",
        },
        warnings=["2 files have no label in"],
    ),
    "biliary_atresia": Tree(
        {
            "data/training_data/3_0.jpg": {
                "patient": "training/3",
                "frame": "training/3_0",
                "label": "biliary atresia",
                "split": "train",
            },
            "data/training_data/498_5.JPG": {"patient": "training/498", "label": "other"},
            "data/test_data/3_0.jpg": {"patient": "test/3", "label": "other", "split": "test"},
        },
        ["data/data introduction.txt", "imgs/fig1.jpg"],
        {
            "data/training_data/label.csv": "3_0.jpg,0\n498_5.JPG,1\n",
            "data/test_data/label.csv": "3_0.jpg,1\n",
        },
    ),
    "busi": Tree(
        {
            f"{_BUSI}/benign/benign (1).png": {
                "patient": "",
                "frame": "benign (1)",
                "label": "benign",
                "mask": f"{_BUSI}/benign/benign (1)_mask.png",
            },
            f"{_BUSI}/benign/benign (10).png": {"label": "benign", "mask": ""},
            f"{_BUSI}/malignant/malignant (1).png": {"label": "malignant"},
            f"{_BUSI}/normal/normal (1).png": {"label": "normal", "mask": f"{_BUSI}/normal/normal (1)_mask.png"},
        },
        [f"{_BUSI}/malignant/malignant (1)_mask{number}.png" for number in ("", "_1", "_2")],
    ),
    "busi folders": Tree(
        {
            "images/benign (1).png": {"label": "benign", "mask": "masks/benign (1)_mask.png"},
            "images/benign (11).png": {"label": "benign", "mask": "masks/0/benign (11).png"},
        },
        ["masks/benign (2).png"],
    ),
    "busi folders by class": Tree(
        {
            "BUSI/benign/images/benign (1).png": {"label": "benign", "mask": "BUSI/benign/masks/benign (1).png"},
            "BUSI/normal/images/normal (1).png": {"frame": "normal (1)", "label": "normal", "mask": ""},
        },
    ),
    "bus_ucml partitions": Tree(
        {
            "BUS-UCLM/partitions/train/images/ALWI_000.png": {
                "patient": "ALWI",
                "label": "benign",
                "split": "train",
                "mask": "BUS-UCLM/partitions/train/masks/ALWI_000.png",
            },
            "BUS-UCLM/partitions/test/images/ANAT_001.png": {"frame": "ANAT_001", "label": "normal", "split": "test"},
        },
        [],
        {"BUS-UCLM/INFO.csv": "Image;Label;Doppler;Marks\nALWI_000.png;Benign;No;No\nANAT_001.png;Normal;No;Yes\n"},
    ),
    "bus_ucml nested": Tree(
        {
            "BUS-UCLM/BUS-UCLM/malignant/images/ALWI_000.png": {
                "patient": "ALWI",
                "label": "malignant",
                "mask": "BUS-UCLM/BUS-UCLM/malignant/masks/ALWI_000.png",
            },
            "BUS-UCLM/BUS-UCLM/benign/images/ANAT_001.png": {"label": "benign"},
        },
        ["BUS-UCLM/partitions/test/images/ALWI_000.png", "BUS-UCLM/partitions/test/masks/ALWI_000.png"],
    ),
    "ddti": Tree(
        {
            "archive/1_1.jpg": {"patient": "1", "frame": "1_1", "label": "4a", "mask": "archive/1.xml"},
            "archive/1_2.jpg": {"patient": "1", "label": "4a", "mask": "archive/1.xml"},
            "archive/10_1.jpg": {"patient": "10", "label": "", "mask": "archive/10.xml"},
        },
        [],
        {"archive/1.xml": ddti("4a", (1, _CORNERS), (2, _CORNERS)), "archive/10.xml": ddti("", (1, _CORNERS))},
        warnings=["1 files have no label in"],
    ),
    "ddti preprocessed": Tree(
        {f"{_DDTI}/p_image/1.PNG": {"frame": "1", "patient": "", "label": "", "mask": f"{_DDTI}/p_mask/1.PNG"}},
        ["DDTI/1_or_data/image/1.PNG", "DDTI/2_preprocessed_data/stage2/p_image/1.PNG"],
    ),
    "dl_track": Tree(
        {
            "apo_images/img_00001.tif": {
                "frame": "apo/img_00001",
                "label": "aponeuroses",
                "mask": "apo_masks/img_00001.tif",
            },
            "fasc_images_S/img_00001.tif": {"label": "fascicles", "mask": "fasc_masks_S/img_00001.tif"},
        },
        ["apo_masks/img_00002.tif"],
    ),
    "dl_track challenge": Tree(
        {
            f"apo_imgs_v1/{_UMUD.format('apo_images')}/a.tif": {
                "frame": "apo/a",
                "label": "aponeuroses",
                "mask": f"apo_masks_v1/{_UMUD.format('apo_masks')}/a.png",
            },
            f"fasc_imgs_v1/{_UMUD.format('fasc_images')}/a.tif": {
                "label": "fascicles",
                "mask": f"fasc_masks_v1/{_UMUD.format('fasc_masks')}/a.tif",
            },
        },
        ["test_images_v2/test_set_v2/t.tif"],
    ),
    "gbcu": Tree(
        {
            "GBCU-Shared/imgs/im00001.jpg": {"frame": "im00001", "patient": "", "label": "malignant", "split": "train"},
            "GBCU-Shared/imgs/im00002.jpg": {"label": "normal", "split": "test"},
        },
        ["GBCU-Shared/bbox_annot.json", "GBCU-Shared/roi_pred.json"],
        {"GBCU-Shared/train.txt": "im00001.jpg,2\n", "GBCU-Shared/test.txt": "im00002.jpg,0\n"},
    ),
    "mmotu_2d by class": Tree(
        {
            f"OTU_2D/8_layers/{folder}/images/{number}.JPG": {
                "frame": str(number),
                "label": label,
                "split": "train",
                "mask": f"OTU_2D/8_layers/{folder}/annotations/{number}_binary.PNG",
            }
            for number, (folder, label) in enumerate(
                {
                    "Chocolate_Cyst": "Chocolate cyst",
                    "High-grade_Serous_Cystadenoma": "High grade serous cystadenocarcinoma",
                    "Mucinous_Cystadenoma": "Mucinous cystadenoma",
                    "Ovary_Normal": "Normal ovary",
                    "Serous_Cystadenoma": "Serous cystadenoma",
                    "Simple_Cyst": "Simple cyst",
                    "Teratoma": "Teratoma",
                    "Theca_Cell_Tumor": "Theca cell tumor",
                }.items()
            )
        }
        | {"OTU_2D/8_layers/Simple Cyst/91.jpg": {"label": "Simple cyst", "mask": ""}},
        ["OTU_2D/8_layers/OTU_2D_8-layers.json", "OTU_2D/8_layers/Teratoma/annotations/6.PNG"],
    ),
    "tg3k": Tree(
        {"tg3k/thyroid-image/0000.jpg": {"frame": "0000", "label": "", "mask": "tg3k/thyroid-mask/0000.jpg"}},
        ["tg3k/tg3k-trainval.json"],
    ),
    "tn3k": Tree(
        {
            "datasets/tn3k/trainval-image/0000.jpg": {
                "frame": "trainval/0000",
                "patient": "",
                "label": "malignant",
                "split": "train",
                "mask": "datasets/tn3k/trainval-mask/0000.jpg",
            },
            "datasets/tn3k/test-image/0000.jpg": {"label": "benign", "split": "test"},
        },
        ["datasets/tn3k/tn3k-trainval-fold0.json"],
        {
            "datasets/tn3k/label4trainval.csv": "0000.jpg,1\n",
            "datasets/tn3k/label4test.csv": "0000.jpg,0\n",
        },
    ),
    "thyroid_us_cineclip": Tree({"dataset.hdf5": {"patient": ""}}, ["metadata.csv"]),
    "ultrasound_fetus_dataset": Tree(
        {f"{_FETUS}/Datasets/benign/100_HC.png": {"patient": "100", "label": ""}},
        [f"{_FETUS}/Datasets/benign/100_HC_Annotation.png", f"{_FETUS}/Datasets/train/benign/100_HC.jpg"],
    ),
    "upbd": Tree({"UBPD/JPEGImages/a1.jpg": {"frame": "a1"}}, ["UBPD/json_train/a1.json", "UBPD/other/a1.jpg"]),
    "brachial_plexus older": Tree({"data/us_videos/P_021_09.mp4": {"video": "P_021_09"}}, ["data/demo/P_021_09.mp4"]),
    "camus_public older": Tree(
        {
            "training/patient0001/patient0001_2CH_ED.mhd": {
                "patient": "patient0001",
                "video": "patient0001_2CH",
                "mask": "training/patient0001/patient0001_2CH_ED_gt.mhd",
            },
            "training/patient0001/patient0001_2CH_sequence.mhd": {"video": "patient0001_2CH", "mask": ""},
        },
        ["training/patient0001/patient0001_2CH_ED.raw", "training/patient0001/patient0001_2CH_ED_gt.raw"],
    ),
    "hc copies": Tree(
        {
            "training/image/010_2HC.png": {
                "patient": "training/010",
                "frame": "training/010_2HC",
                "mask": "training/annotation/010_2HC_Annotation.png",
            },
            "training/image/010_HC.png": {"split": "train"},
        },
        warnings=["2 files have no spacing in"],
    ),
    "kidney_us elsewhere": Tree(
        {"images/1_IM-0001-0059_anon.png": {"patient": "IM-0001-0059"}},
        ["labels/reviewed_masks_1/capsule/1_IM-0001-0059_anon.png"],
    ),
    "mmotu_2d mirror": Tree(
        {
            "dataset/OTU_2D/train/train_image/1.JPG": {"frame": "train/1", "split": "train", "label": ""},
            "dataset/OTU_2D/test/image/1.JPG": {"frame": "test/1", "split": "test"},
        },
        ["dataset/OTU_2D/train/train_label/label/1.PNG", "dataset/OTU_2D/test/label/black_write/1.PNG"],
    ),
    "mmotu_3d mirror": Tree({"dataset/OTU_CEUS/image/1.JPG": {"frame": "1"}}, ["dataset/OTU_CEUS/label/1.PNG"]),
    "pluslib": Tree(
        {"TestImages/Sweep.igs.mha": {"video": "Sweep.igs"}, "TestImages/Prostate.igs.mhd": {}, "One.nrrd": {}},
        ["TestImages/Prostate.raw", "TestImages/PLUS_FRAMES.csv"],
    ),
    "pocus licences": Tree(
        {
            "pocus_images/convex/Pneu_emdocs_1.png": {"patient": "219", "label": "bacterial pneumonia"},
            "pocus_videos/convex/Reg_pat1Image_132943.mpeg": {"patient": "4", "label": "regular"},
        },
        ["pocus_images/convex/notes.txt"],
        {
            "file_licences.csv": (
                "file,label,patient_id\npocus_images/convex/Pneu_emdocs_1.png,Bacterial pneumonia,219\n"
                "pocus_videos/convex/Reg_pat1Image_132943.mpeg,regular,4\n"
            )
        },
    ),
    "timtrack_muscle": Tree(
        {
            "S1/S1_L20_step_025.png": {"patient": "S1", "video": "S1_L20", "frame": "S1_L20/025"},
            "S10/S10_R20_step_025.png": {"patient": "S10"},
        },
    ),
    "upbd wide": Tree({"UBPD/a1.jpg": {"frame": ""}}, ["UBPD/a1.json"]),
    "usgra_nerve": Tree({"images/0000.png": {"mask": "masks/0000.png", "split": "train", "frame": ""}}),
}
