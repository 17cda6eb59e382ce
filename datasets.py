"""Mammography data sets, as published, become rows with labels and boxes (MammoDINO 3.3; DBT-DINO 2.4).

    rows, notes = load('vindr', 'VINDR')            # rsna, vindr, cbis, cmmd, cesm, mias, bcs or csv
    row.path, row.patient, row.split, row.labels['density'], row.boxes

finetune.py takes the labels, detect.py the boxes. A data set and a seed have one split for both, so an
encoder that was finetuned on a data set has never seen the test patients of a detector.

Frames count from 0, boxes are x0 y0 x1 y1 in pixels of the published file, K H W is the size of a file.
What is wrong with a label file raises ValueError: one sentence with the file and the line.
"""
import contextlib
import csv
import hashlib
import io
import math
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
from scipy import ndimage
from tqdm import tqdm

from images import listing, read, shape

TASKS = ('cancer', 'lesion', 'lesion_type', 'birads', 'density', 'risk')
TYPES = ('calcification', 'mass', 'both')
CLASSES = dict(                         # data set -> its tasks -> classes in order; '': those that occur
    rsna=dict(cancer='01', birads='120', density='ABCD'),
    vindr=dict(cancer='01', lesion='01', lesion_type='', birads='12345', density='ABCD'),
    cbis=dict(cancer='01', lesion_type=TYPES, birads='', density='1234'),
    cmmd=dict(cancer='01', lesion='01', lesion_type=TYPES),
    cesm=dict(cancer='01', lesion='01', birads='', density='ABCD'),
    mias=dict(cancer='01', lesion='01', density='FGD',
              lesion_type=('ARCH', 'ASYM', 'CALC', 'CIRC', 'MISC', 'SPIC')),
    bcs=dict(cancer='01'),
    csv=dict(cancer='01', lesion='01', lesion_type='', birads='', density='abcd',
             risk=('year 1', 'year 2', 'year 3', 'year 4', 'year 5')))
LEVELS = {'rsna': 'breast', 'vindr': 'breast', 'cmmd': 'breast', ('vindr', 'lesion'): 'image',
          ('vindr', 'lesion_type'): 'image', ('csv', 'risk'): 'exam'}       # as their labels are given
TOMPEI = 'TOMPEI-CMMD adds it for MLO views: join its sheet and use --dataset csv'
REFUSED = {
    ('rsna', 'lesion'): 'RSNA has no lesion labels; BI-RADS 0 (recalled) is nearest: --task birads',
    ('rsna', 'lesion_type'): 'RSNA has no lesion labels',
    ('vindr', 'cancer'): 'VinDr has no cancer label; choose --cancer_rule birads5 or birads45',
    ('cbis', 'lesion'): 'CBIS-DDSM has no normal breasts; add those of DDSM and use --dataset csv',
    ('cmmd', 'birads'): f'CMMD has no BI-RADS; {TOMPEI}',
    ('cmmd', 'density'): f'CMMD has no density; {TOMPEI}',
    ('cesm', 'lesion_type'): 'CDD-CESM has findings as free text; choose a rule, use --dataset csv',
    ('mias', 'birads'): 'mini-MIAS has no BI-RADS; --task density has its own three classes, F G D'}
CLASSES['ddsm'], REFUSED['ddsm', 'lesion'] = CLASSES['cbis'], REFUSED['cbis', 'lesion']
RULES = dict(vindr=('birads5', 'birads45'), cmmd=('unlisted',))             # values of --cancer_rule
MAX_ABSENT = 0.05                       # share of files that may be absent or unusable


@dataclass
class Row:
    """A mammogram, a DBT volume, or one frame of a volume."""
    path: str                           # of the file to read: below --images where that is given
    patient: str
    exam: str = ''                      # of a patient with several; the challenge's StudyUID
    laterality: str = ''                # L or R
    view: str = ''                      # CC, MLO, ...; BCS-DBT: lcc, rmlo2, ...
    split: str = ''                     # train, val or test; '' until `assign`
    labels: dict = field(default_factory=dict)      # task -> label as text; risk -> see `follow_up`
    boxes: list = field(default_factory=list)       # (frame, x0, y0, x1, y1, kind), pixels of `file`
    normal: bool = True                 # without boxes it may serve as a normal in training
    frame: int | None = None            # None: every frame of the file
    record: dict = field(default_factory=dict)      # its line of the label file, for subgroups
    name: str = ''                      # the path from the data set's folder on
    file: str = ''                      # as published; `path` may be a prepared copy
    shape: tuple | None = None          # (K, H, W) of `file`, once read
    upside: bool = False                # may be stored upside down (BCS-DBT); laterality decides
    unplaced: str = ''                  # why its lesions have no boxes; then no part in detection
    partner: 'Row | None' = None        # the other image of a pair (fuse.py)

    def __post_init__(self):
        self.file = self.file or self.path

    @property
    def key(self):
        """The DBTex challenge's name of an image: patient, study, view."""
        view = self.view if self.upside else self.laterality + self.view    # lcc, but L and CC
        return self.patient, self.exam or self.name, view


# ---- label files ---------------------------------------------------------------------------------

NO_VALUE = {'nan', 'na', 'n/a', 'null', 'none'}


class Line(dict):
    """A row of a table, column -> text; `number` is its line in the file."""
    number = 0


def table(path, *columns, sheet=None):
    """A CSV, or a sheet of an .xlsx (the first by default) -> list of `Line`s, where '' is blank.

    A CSV that was saved beside an .xlsx, under its name, is read instead. It may be UTF-8 or UTF-16, with
    commas, semicolons or tabs. `columns` must be there, none may stand twice, and every row must have as
    many cells as the header."""
    path, comma, at, rows = Path(path), ',', 1, []          # at: the line where a row begins
    if path.suffix == '.xlsx' and path.with_suffix('.csv').exists():
        path = path.with_suffix('.csv')
    try:
        if path.suffix == '.xlsx':
            rows = _sheet(path, sheet)
        else:
            data = path.read_bytes()                        # a BOM says UTF-16; utf-8-sig drops its own
            text = data.decode('utf-16' if data[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig')
            comma = max(',;\t', key=text.split('\n', 1)[0].count)
            reader = csv.reader(io.StringIO(text, newline=''), delimiter=comma, strict=True)
            for cells in reader:
                rows.append((at, cells))
                at = reader.line_num + 1
    except UnicodeDecodeError as problem:
        raise ValueError(f'{path}: {problem}; save it as CSV in UTF-8') from None
    except csv.Error as problem:
        raise ValueError(f'{path}, line {at}: {problem}; is there a quote too many?') from None
    rows = [(at, cells) for at, cells in rows if any(map(str.strip, cells))]
    (at, header), *rows = rows or [(1, [''])]
    header = [cell.strip() for cell in header]
    missing = [name for name in columns if name not in header]
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if missing or twice:
        wrong = f'the column {twice[0]} twice' if twice else f'no column {", ".join(missing)}'
        found = ', '.join(filter(None, header)) or 'nothing'
        raise ValueError(f'{path}, line {at}: {wrong}; found {found}')
    lines = []
    for at, cells in rows:
        # A quote that opens in one row and closes in another makes one cell of all between.
        joined = any('\n' in c.strip() and c.count(comma) >= len(header) - 1 > 0 for c in cells)
        if joined or len(cells) != len(header):
            wrong = 'a cell holds whole rows' if joined else f'{len(cells)} cells'
            raise ValueError(f'{path}, line {at}: {wrong}, expected {len(header)} cells; is a '
                             'comma or a quote wrong?')
        cells = [re.sub(r'[^\S ]+', ' ', cell).strip() for cell in cells]
        cells = ['' if cell.lower() in NO_VALUE else cell for cell in cells]
        lines.append(Line((name, cell) for name, cell in zip(header, cells) if name))
        lines[-1].number = at
    return lines


def _sheet(path, sheet):
    """-> [(number of the row, its cells as text)]"""
    try:
        import openpyxl
        book = openpyxl.load_workbook(path, data_only=True)
        names = [name for name in book.sheetnames if name.strip() == sheet] or book.sheetnames
        rows = list(book[names[0]].iter_rows(values_only=True))
    except ImportError:
        raise ValueError(f'{path}: pip install openpyxl, or save the sheet as CSV beside it, '
                         f'{path.stem}.csv') from None
    except Exception as problem:                            # a zip and its XML break in many ways
        raise ValueError(f'{path}: not a readable .xlsx ({problem}); save it again') from None
    texts = [['' if cell is None else str(cell) for cell in cells] for cells in rows]
    return list(enumerate(texts, 1))


def number(line, name, path, whole=False):
    """A cell as a finite number, or as a whole one from 0."""
    try:
        value = float(line[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or whole and (value < 0 or value % 1):
        kind = 'whole number from 0' if whole else 'number'
        raise ValueError(f'{path}, line {line.number}: {name} is {line[name]!r}; expected a {kind}')
    return int(value) if whole else value


def highest(values, **labels):
    """The highest of the labels that the values stand for; a value that stands for none stays itself."""
    return max(labels.get(value, value) for value in values)


# ---- one function for each data set --------------------------------------------------------------
# root, the folder with the images, whether boxes are wanted, kinds of boxes that win -> rows, notes

def rsna(root, folder, boxes, findings):
    """RSNA 2022 (Kaggle): train.csv, train_images/<patient>/<image>.dcm. Labels are those of the breast.
    BI-RADS is 1, 2 or 0 (recalled, which gives cancer away) on half of the images."""
    rows = []
    for r in table(f'{root}/train.csv', 'patient_id', 'image_id', 'laterality', 'view', 'cancer',
                   'BIRADS', 'density'):
        patient, image = r['patient_id'], r['image_id']
        labels = dict(cancer=r['cancer'], birads=r['BIRADS'], density=r['density'])
        rows.append(Row(f'{root}/train_images/{patient}/{image}.dcm', patient, '', r['laterality'],
                        r['view'], labels=labels, record=r))
    return rows, []


def vindr(root, folder, boxes, findings):
    """VinDr-Mammo: breast-level_annotations.csv, finding_annotations.csv, images/<study>/<image>.dicom.
    lesion: the image has a box. lesion_type: the first category of its largest box. The kind of a box is
    the first of its categories, or the first among `findings`."""
    path, lesions, types = f'{root}/finding_annotations.csv', defaultdict(list), defaultdict(list)
    rows = []
    for r in table(path, 'image_id', 'finding_categories', 'xmin', 'ymin', 'xmax', 'ymax'):
        if r['xmin']:
            x0, y0, x1, y1 = (number(r, edge, path) for edge in ('xmin', 'ymin', 'xmax', 'ymax'))
            kinds = re.findall("'([^']+)'", r['finding_categories']) or ['lesion']
            kind = next((kind for kind in kinds if kind in findings), kinds[0])
            lesions[r['image_id']].append((0, x0, y0, x1, y1, kind))
            types[r['image_id']].append(((x1 - x0) * (y1 - y0), kinds[0]))
    for r in table(f'{root}/breast-level_annotations.csv', 'study_id', 'image_id', 'laterality',
                   'view_position', 'breast_birads', 'breast_density', 'split'):
        image, split = r['image_id'], r['split'].removesuffix('ing')
        labels = dict(lesion=str(int(image in types)),
                      lesion_type=max(types[image])[1] if image in types else '',
                      birads=r['breast_birads'].removeprefix('BI-RADS '),
                      density=r['breast_density'].removeprefix('DENSITY '))
        path = f'{root}/images/{r["study_id"]}/{image}.dicom'
        rows.append(Row(path, r['study_id'], '', r['laterality'], r['view_position'], split, labels,
                        lesions[image], record=r))
    return rows, []


def cbis(root, folder, boxes, findings):
    """CBIS-DDSM: {mass,calc}_case_description_{train,test}_set.csv, one row per abnormality. A film is one
    Row: cancer, BI-RADS and density are the highest of its abnormalities, the boxes those of their ROI
    masks. Files are found by folder, Mass-Training_P_00001_LEFT_CC, or by series UID."""
    films, places, rows = defaultdict(list), defaultdict(list), []
    for path in sorted(Path(root).glob('????_case_description_*_set.csv'), reverse=True):
        density = 'breast_density' if path.stem.startswith('mass') else 'breast density'
        for r in table(path, 'patient_id', density, 'left or right breast', 'image view',
                       'abnormality type', 'assessment', 'pathology', 'image file path',
                       'ROI mask file path', 'cropped image file path'):
            r['density'] = r[density].replace('0', '')
            side, split = r['left or right breast'][:1].upper(), path.stem.split('_')[3]
            films[split, r['patient_id'], side, r['image view']].append(r)
    if not films:
        raise ValueError(f'{root}: none of the CSVs, such as mass_case_description_train_set.csv')
    for file in listing(folder):
        for part in Path(file).parts[:-1]:
            places[part].append(file)

    def files(cell):
        name, _, series, *_ = (part.strip('" ') for part in (cell + '///').split('/'))
        return places.get(name) or places.get(series) or [f'{root}/{name}']

    for (split, patient, side, view), found in tqdm(films.items(), 'films', delay=2, disable=None):
        types = {'calcification' if r['abnormality type'][:4] == 'calc' else 'mass' for r in found}
        verdict = highest((r['pathology'] for r in found), MALIGNANT='1', BENIGN='0',
                          BENIGN_WITHOUT_CALLBACK='0')
        labels = dict(cancer=verdict, lesion='1', birads=max(r['assessment'] for r in found),
                      lesion_type='both' if len(types) == 2 else types.pop(),
                      density=max(r['density'] for r in found))
        path = files(found[0]['image file path'])[0]
        row = Row(path, patient, '', side, view, split, labels, record=found[0])
        rows.append(row)
        try:
            for r in found if boxes else ():
                row.shape = row.shape or shape(path)
                rois = {*files(r['ROI mask file path']), *files(r['cropped image file path'])}
                kind = 'cancer' if r['pathology'] == 'MALIGNANT' else 'benign'
                row.boxes.append((0, *roi_box(rois, row.shape[1:]), kind))
        except (ValueError, OSError) as problem:
            row.boxes, row.unplaced = [], f'{path} has no boxes: {problem}'
    return rows, []


def roi_box(files, film):
    """The box of the largest piece of an ROI mask, in pixels of a film (H, W). Mask and crop are swapped in
    part of the rows: the mask is the largest file with two values. One of another size is scaled."""
    masks = []
    for file in sorted(files):
        with contextlib.suppress(ValueError, OSError):      # a constant or damaged crop is no mask
            masks.append(read(file))
    masks = [roi for roi in masks if np.isin(roi, (0, 255)).all()]
    if not masks:
        raise ValueError(f'none of {len(files)} ROI files is a mask of two values')
    roi = max(masks, key=np.size)
    down, across = np.divide(film, roi.shape)
    if abs(down / across - 1) > 0.02:
        raise ValueError(f'an ROI mask of {roi.shape} pixels and a film of {film}, another aspect')
    pieces, _ = ndimage.label(roi)
    y, x = ndimage.find_objects(pieces)[np.bincount(pieces.ravel())[1:].argmax()]
    return x.start * across, y.start * down, x.stop * across, y.stop * down


CMMD_TWINS = ('D1-0202', 'D2-0284', 'D1-0808', 'D1-1292')   # the same pixels under two names


def cmmd(root, folder, boxes, findings):
    """CMMD: CMMD_clinicaldata_revision.xlsx, one row per breast, and DICOM below <ID1>/, whose headers give
    side and view. lesion: the breast has a row. The 1,458 images of breasts without one are negatives of
    cancer under --cancer_rule unlisted alone."""
    lines = table(f'{root}/CMMD_clinicaldata_revision.xlsx', 'ID1', 'LeftRight', 'abnormality',
                  'classification')
    listed, rows, skipped = {(r['ID1'], r['LeftRight']): r for r in lines}, [], []
    for path in tqdm(listing(root), 'headers', delay=2, disable=None):
        patient = next((p for p in Path(path).parts if re.fullmatch(r'D[12]-\d{4}', p)), None)
        if patient in (None, *CMMD_TWINS) or path.lower().endswith('.npy'):
            continue
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True,
                                     specific_tags=['ImageLaterality', 'ViewCodeSequence'])
            side, meaning = header.ImageLaterality, header.ViewCodeSequence[0].CodeMeaning
        except Exception:                                   # pydicom's words may quote the header
            skipped.append(path)
            continue
        r = listed.get((patient, side), dict.fromkeys(lines[0], ''))
        labels = dict(cancer=highest([r['classification']], Malignant='1', Benign='0'),
                      lesion=str(int((patient, side) in listed)), lesion_type=r['abnormality'])
        view = 'CC' if meaning.startswith('cranio') else 'MLO'
        rows.append(Row(path, patient, '', side, view, labels=labels, record=r))
    twins = f'{", ".join(CMMD_TWINS)} are the same images under two names and take no part'
    lost = f'{len(skipped)} files have no side or view in their header and take no part'
    return rows, [twins, lost] if skipped else [twins]


def cesm(root, folder, boxes, findings):
    """CDD-CESM: 'Radiology manual annotations.xlsx', sheet 'all', and the low-energy JPEGs; one row per
    lesion. The worst counts, as in a BI-RADS of "4$5"; BI-RADS 6 (known cancer) is no label. The authors'
    split, {training,testing}_set_pathology.csv, is used where it lies beside; it mixes patients."""
    root, films, rows = Path(root), defaultdict(list), []
    name, verdict = 'Image_name', 'Pathology Classification/ Follow up'
    files, split = {Path(path).stem.strip(): path for path in listing(folder)}, {}
    for part in ('train', 'test'):
        path = root / f'{part}ing_set_pathology.csv'
        split |= {r[name]: part for r in table(path, name)} if path.exists() else {}
    sheets = sorted(root.glob('Radiology?manual?annotations.*'))
    for r in table(sheets[0] if sheets else root / 'Radiology manual annotations.xlsx', name,
                   'Patient_ID', 'Side', 'Type', 'View', 'BIRADS', 'Breast density (ACR)', verdict,
                   sheet='all'):
        if r['Type'] == 'DM':
            films[r[name]].append(r)
    for film, found in films.items():
        first, verdicts = found[0], [r[verdict] for r in found]
        grades = [grade.removesuffix('.0') for r in found for grade in r['BIRADS'].split('$')]
        labels = dict(cancer=highest(verdicts, Normal='0', Benign='0', Malignant='1'),
                      lesion=highest(verdicts, Normal='0', Benign='1', Malignant='1'),
                      birads='' if '6' in grades else max(grades),
                      density=first['Breast density (ACR)'].upper().strip('_'))
        path = files.get(film, f'{root}/Low energy images of CDD-CESM/{film}.jpg')
        rows.append(Row(path, first['Patient_ID'].removesuffix('.0'), '', first['Side'][:1].upper(),
                        first['View'], split.get(film, ''), labels, record=first))
    return rows, []


def mias(root, folder, boxes, findings):
    """mini-MIAS: Info.txt and mdb001 … mdb322, MLO films; mdb001 and mdb002 are one patient, odd is R.
    lesion: anything but NORM. A circle becomes a square; its y counts from the bottom."""
    films, rows = defaultdict(list), []
    files = {Path(path).stem: path for path in listing(folder)}
    circle = r'(?: +(\d{1,4}) +(\d{1,4}) +(\d{1,4})\b)?'
    for line in Path(root, 'Info.txt').read_text(errors='replace').splitlines():
        if found := re.match(r'(mdb\d{3}) +([FGD]) +(\w+)(?: +([BM])\b)?' + circle, line):
            films[found[1]].append(found.groups()[1:])
    for film, found in films.items():
        order, density, severity = int(film[3:]), found[0][0], found[0][2] or 'N'
        types = [kind for _, kind, *_ in found if kind != 'NORM']
        malignant = any(grade == 'M' for _, _, grade, *_ in found)
        labels = dict(cancer=str(int(malignant)), lesion=str(int(bool(types))), density=density,
                      lesion_type=types[0] if types else '')
        path, patient = files.get(film, f'{root}/{film}.pgm'), f'{(order + 1) // 2:03d}'
        row = Row(path, patient, '', 'LR'[order % 2], 'MLO', labels=labels,
                  record=dict(density=density, severity=severity))
        for _, kind, grade, x, y, radius in found:
            if x:
                x, y, radius = int(x), 1024 - int(y), int(radius)
                row.boxes.append((0, x - radius, y - radius, x + radius, y + radius,
                                  'cancer' if grade == 'M' else 'benign'))
            elif kind != 'NORM':
                row.unplaced = f'{film} has a lesion that Info.txt does not place'
        if boxes and row.boxes and os.path.isfile(path) and shape(path)[1:] != (1024, 1024):
            row.unplaced = f'{path}: not 1024x1024, so the circles of Info.txt do not fit'
        row.boxes = [] if row.unplaced else row.boxes
        rows.append(row)
    return rows, []


KEY = ('PatientID', 'StudyUID', 'View')


def bcs(root, folder, boxes, findings):
    """BCS-DBT (Duke, DBTex): BCS-DBT-{labels,boxes,file-paths}-{train,validation,test}*.csv beside the DICOM
    tree. Actionable volumes, recalled but without a box, are no normals."""
    rows, counts = {}, []
    for split, part in dict(train='train', val='validation', test='test').items():
        editions = [sorted(Path(root).glob(f'BCS-DBT-{kind}-{part}*.csv'),
                           key=lambda path: (len(path.stem), path))
                    for kind in ('labels', 'boxes', 'file-paths')]
        if not any(editions):
            continue
        if not all(editions):
            raise ValueError(f'{root}: BCS-DBT-labels, -boxes or -file-paths-{part}*.csv is absent')
        labels, lesions, paths = (found[-1] for found in editions)  # the longest name is the latest
        files = {tuple(r[k] for k in KEY): r
                 for r in table(paths, *KEY, 'descriptive_path', 'classic_path')}
        for r in table(labels, *KEY, 'Normal', 'Cancer'):
            key, side = tuple(r[k] for k in KEY), r['View'][:1].upper()
            if key in rows or key not in files or side not in ('L', 'R'):
                raise ValueError(f'{labels}, line {r.number}: {"/".join(key)} is there twice, not '
                                 f'in {paths.name}, or its view begins with neither l nor r')
            places = [Path(root, files[key][name]) for name in ('classic_path', 'descriptive_path')]
            series = [file for place in places for file in (place, *sorted(place.glob('*.dcm')))]
            path = str(next(filter(Path.is_file, series), places[0]))
            normal, cancer = (number(r, name, labels) == 1 for name in ('Normal', 'Cancer'))
            rows[key] = Row(path, *key[:2], side, r['View'], split, dict(cancer=str(int(cancer))),
                            normal=normal, record=r, upside=True)
        for r in table(lesions, *KEY, 'Slice', 'X', 'Y', 'Width', 'Height', 'Class',
                       'VolumeSlices'):
            row = rows.get(tuple(r[k] for k in KEY))
            if not row:
                raise ValueError(f'{lesions}, line {r.number}: its volume is not in {labels.name}')
            x, y, w, h = (number(r, name, lesions) for name in ('X', 'Y', 'Width', 'Height'))
            z, K = (number(r, name, lesions, whole=True) for name in ('Slice', 'VolumeSlices'))
            row.boxes.append((z, x, y, x + w, y + h, r['Class']))
            row.record['VolumeSlices'] = K
        counts.append(f'{part} {sum(row.split == split for row in rows.values()):,}')
    if not rows:
        raise ValueError(f'{root}: no BCS-DBT-labels-*.csv; expected those of the BCS-DBT archive')
    return list(rows.values()), [f'volumes: {", ".join(counts)} of 19,148, 1,163 and 1,721']


EDGES = ('x0', 'y0', 'x1', 'y1')
SAME = ('path', 'volume', 'patient', 'exam', 'study', 'laterality', 'view', 'split', 'normal',
        'upside', 'years_to_cancer', 'years_followup', *TASKS)      # in all lines of an image


def own_list(root, folder, boxes, findings):
    """A CSV of your own, at --root or in it as manifest.csv or lesions.csv; a line per image, frame or box.

    path (from the CSV's folder) and patient (by default the volume, where the list has boxes); x0 y0 x1 y1
    of a box; frame: where the box lies, without a box the one that counts; a column named as the task, for
    risk years_to_cancer (blank: none seen) and years_followup; label: the kind of a box, without a box the
    label of tasks without a column. Optional: volume (a name, by default the path), exam or study,
    laterality, view, split, normal (0: no normal to train on), upside (1: may be stored upside down)."""
    path = Path(root)
    if path.is_dir():
        path /= 'manifest.csv' if (path / 'manifest.csv').exists() else 'lesions.csv'
    columns = {name for r in table(path, 'path') for name in r}
    boxed = bool(columns & {*EDGES})
    rows, splits, keys, close = {}, {}, {}, 0
    for r in table(path, 'path', *EDGES if boxed else ['patient']):
        cells, box = defaultdict(str, r), ()
        if any(cells[edge] for edge in EDGES):
            box = tuple(number(r, edge, path) for edge in EDGES)
        name, side = os.path.normpath(r['path']), cells['laterality']
        name = cells['volume'] or name if boxed else name
        patient, upside = cells['patient'] or (name if boxed else ''), cells['upside'] == '1'
        view = cells['view'] if upside else cells['view'].upper()           # lcc of BCS-DBT
        split = cells['split'].lower()
        split = dict(training='train', validation='val').get(split, split)
        frame = number(r, 'frame', path, whole=True) if cells['frame'] else None
        labels = {task: r.get(task, '' if box else cells['label']) for task in TASKS[:-1]}
        cancer, followed = (number(r, column, path) if cells[column] else None
                            for column in ('years_to_cancer', 'years_followup'))
        if cancer is not None or followed is not None:
            labels['risk'] = follow_up(math.inf if cancer is None else cancer,
                                       cancer if followed is None else followed)
        file, exam = os.path.join(path.parent, r['path']), cells['exam'] or cells['study']
        row = Row(file, patient, exam, side, view, split, labels, [], cells['normal'] != '0',
                  None if box else frame, r, name, upside=upside)
        known = rows.setdefault((os.path.realpath(file), row.frame), row)   # where a link leads
        lesion, again, first = (frame or 0, *box), known is not row, known.record.number
        other = [column for column in SAME if r.get(column) != known.record.get(column)]
        for wrong, why in (
                (not r['path'] or not patient, 'path and patient must not be blank'),
                (side not in ('', 'L', 'R'), f'laterality is {side!r}; expected L, R or blank'),
                ({cells['normal'], cells['upside']} - {'', '0', '1'},
                 'normal and upside must be 0, 1 or blank'),
                (any(re.fullmatch(r'\d+,\d+', cells[c]) for c in ('label', *TASKS)),
                 'a label with a decimal comma; write a point'),
                (splits.setdefault(patient, split) != split,
                 f'patient {patient} is in split {split!r}, above in {splits[patient]!r}'),
                (again and other, f'the file of line {first}, with another {", ".join(other)}'),
                (again and not (box and known.boxes), f'the file stands in line {first} already'),
                (lesion in [b[:5] for b in known.boxes], 'this box is listed twice'),
                (boxed and keys.setdefault(row.key, known) is not known,
                 'patient, exam, laterality and view are those of another image')):
            if wrong:
                raise ValueError(f'{path}, line {r.number}: {why}')
        if box:
            close += any(b[0] == lesion[0] and iou(b[1:5], box) > 0.9 for b in known.boxes)
            known.boxes.append((*lesion, cells['label'] or 'lesion'))
    edges = [edge for row in rows.values() for b in row.boxes for edge in b[1:5]]
    if edges and 0 <= min(edges) and max(edges) <= 1:
        raise ValueError(f'{path}: all boxes lie within 0 … 1; expected pixels, no shares')
    others, notes = sorted(columns - {*SAME, *EDGES, 'frame', 'label'}), []
    if close:
        notes.append(f'{close} boxes overlap another on their frame by more than 0.9 (IoU)')
    if others:
        notes.append(f'columns for --subgroup alone: {", ".join(others)}')
    return list(rows.values()), notes


def iou(a, b):
    """Intersection over union of two boxes x0 y0 x1 y1."""
    a, b = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))
    common = np.clip(np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]), 0, None).prod()
    return common / max((a[1] - a[0]).prod() + (b[1] - b[0]).prod() - common, 1e-12)


def follow_up(years_to_cancer, years_followup, years=5):
    """One exam -> (T,) of 1 cancer by then, 0 none, -1 not observed; None where no year was observed, or
    cancer came before the exam. years_to_cancer is infinite where none was seen.

    Cancer in year c, from 0: 1 at c and -1 after it, since follow-up ends with the diagnosis and one cancer
    must not count in every later year. No cancer: 0 over the whole years of follow-up."""
    cancer, year = years_to_cancer < years, np.arange(years)
    first = math.floor(years_to_cancer) if cancer else years
    last = first + 1 if cancer else math.floor(min(years_followup, years))
    return np.where(year >= last, -1, year >= first) if last > 0 and first >= 0 else None


DATASETS = dict(rsna=rsna, vindr=vindr, cbis=cbis, ddsm=cbis, cmmd=cmmd, cesm=cesm, mias=mias,
                bcs=bcs, csv=own_list)


# ---- rows -> splits -> files ---------------------------------------------------------------------

def load(name, root, images=None, seed=0, cancer_rule=None, boxes=False, findings=()):
    """-> rows, each with a split, and notes on what was left out, one sentence each.

    images: the folder that prepare.py wrote. cancer_rule: one of RULES. boxes: True for a detector. Then ROI
    masks and the headers of files with boxes are read, images with a lesion of unknown place take no part,
    and test rows with boxes stay even without their file. findings: the kinds of boxes that count, by
    default all."""
    if cancer_rule and cancer_rule not in RULES.get(name, ()):
        raise ValueError(f'--cancer_rule {cancer_rule} --dataset {name}: expected one of {RULES}')
    rows, notes = DATASETS[name](root, root if boxes else images or root, boxes, findings)
    if not rows:
        raise ValueError(f'{root}: its label file has a header and no rows')
    home = root if os.path.isdir(root) else os.path.dirname(root) or '.'
    for row in rows:
        row.labels = {task: label if task == 'risk' else label.removesuffix('.0')
                      for task, label in row.labels.items() if label is not None and len(label)}
        copied = images and Path(row.path).is_relative_to(images)
        row.name = row.name or os.path.relpath(row.path, images if copied else home)
        if images and not copied:
            row.path = prepared(row.path, home, images)
    # Splits come first, so that neither an absent file nor the rule for cancer changes them.
    rows = assign(rows, seed, notes)
    for row in rows if cancer_rule else ():
        if name == 'cmmd' and row.labels['lesion'] == '0':
            row.labels['cancer'] = '0'
        elif name == 'vindr' and 'birads' in row.labels:
            suspicious = cancer_rule.removeprefix('birads')             # '5' or '45'
            row.labels['cancer'] = str(int(row.labels['birads'] in suspicious))
    if findings:
        count_only(rows, findings, notes)
    return usable(rows, boxes, notes), notes


def count_only(rows, findings, notes):
    """Drops the boxes of other kinds than `findings`; their images are no normals either."""
    kinds = {box[-1] for row in rows for box in row.boxes}
    if not kinds.issuperset(findings):
        raise ValueError(f'--findings {", ".join(findings)}: expected some of '
                         f'{", ".join(sorted(kinds))}')
    dropped = 0
    for row in rows:
        kept = [box for box in row.boxes if box[-1] in findings]
        dropped += len(row.boxes) - len(kept)
        row.normal = row.normal and len(kept) == len(row.boxes)
        row.boxes = kept
    notes.append(f'{dropped} boxes of kinds other than {", ".join(findings)} do not count, but '
                 'their images are no normals')


def prepared(path, home, images):
    """Where prepare.py has put the copy of a file below `home`."""
    name = os.path.relpath(path, home)
    if name.startswith('..'):
        raise ValueError(f'{path} lies outside {home}, so --images cannot mirror it')
    copies = Path(images, name), Path(images, name).with_suffix('.npy'), Path(images, f'{name}.npy')
    return str(next(filter(Path.exists, copies), copies[1]))


def usable(rows, boxes, notes):
    """The rows whose file is there and, for a detector, fits its boxes. A test row with boxes stays even so,
    without a shape: its lesions count as missed."""
    kept, bad, outside = [], [], 0
    for row in tqdm(rows, 'files', delay=2, disable=None):
        try:
            if not os.path.isfile(row.path):
                raise OSError(f'{row.path}: no such file')
            if boxes and row.unplaced:
                raise ValueError(row.unplaced)
            if boxes and row.boxes:
                row.shape = row.shape or shape(row.file)
                slices = int(row.record.get('VolumeSlices') or row.shape[0])
                if slices != row.shape[0]:
                    raise ValueError(f'{row.file}: {row.shape[0]} slices, {slices} by its label')
        except (ValueError, OSError) as problem:
            bad.append(problem)
            row.shape = None
            if not (boxes and row.boxes and row.split == 'test'):
                continue
        outside += check_boxes(row)
        kept.append(row)
    if bad:
        notes.append(f'{len(bad)} of {len(rows)} files are absent or unusable and take no part; '
                     f'lesions of the test set among them count as missed; the first: {bad[0]}')
    if len(bad) > MAX_ABSENT * len(rows):
        raise ValueError(f'{notes[-1]}; are --root and --images the right folders?')
    if outside:
        notes.append(f'{outside} boxes stick out of their image; training sees what is inside')
    return kept


def check_boxes(row):
    """How many boxes stick out of their image. ValueError for one without area, outside the image, or on a
    frame that the file does not have; without a shape only for the first."""
    K, H, W = row.shape or (math.inf, math.inf, math.inf)
    for z, x0, y0, x1, y1, _ in row.boxes:
        if min(x1, W) <= max(x0, 0) or min(y1, H) <= max(y0, 0) or z >= K:
            raise ValueError(f'{row.file}: the box {x0:g} {y0:g} {x1:g} {y1:g} on frame {z} has no '
                             f'area or lies outside the file, {K} frames from 0 of {W}x{H} pixels')
    return sum(x0 < 0 or y0 < 0 or x1 > W or y1 > H for _, x0, y0, x1, y1, _ in row.boxes)


def drawn(patients, share, seed, rounded=round):
    """A share of {patient: stratum}, of each stratum alike. Seed and names alone set the order, so that a
    smaller share lies in a larger one."""
    strata = defaultdict(list)
    for name in sorted(patients, key=lambda n: hashlib.sha256(f'{seed} {n}'.encode()).digest()):
        strata[patients[name]].append(name)
    return {name for names in strata.values() for name in names[:rounded(share * len(names))]}


def assign(rows, seed, notes):
    """Every row's split. Published ones stay; a patient in two keeps the test rows. Without a test set a
    fifth of the patients becomes one, without a validation set a fifth of those in training: a fifth of
    those with a lesion or cancer, and of the others."""
    splits, ill = defaultdict(set), defaultdict(bool)
    for row in rows:
        splits[row.patient].add(row.split)
        cancer = '1' in map(row.labels.get, ('cancer', 'lesion')) or 1 in row.labels.get('risk', ())
        ill[row.patient] |= cancer or bool(row.boxes)
    names = set().union(*splits.values())
    if names - {'train', 'val', 'test'} and names != {''}:
        raise ValueError(f'splits {", ".join(map(repr, sorted(names)))}: expected train, val, test '
                         'or blank throughout')
    leaks = sorted(patient for patient, of in splits.items() if len(of) > 1)
    kept = [row for row in rows if row.split == 'test' or len(splits[row.patient]) == 1]
    if leaks:
        notes.append(f'{len(leaks)} patients are in two official splits; {len(rows) - len(kept)} '
                     f'images outside the test set take no part: {", ".join(leaks)}')
    for split, free in (('test', ''), ('val', 'train')):
        if not any(row.split == split for row in kept):
            pool = [row for row in kept if row.split == free]
            taken = drawn({row.patient: ill[row.patient] for row in pool}, 0.2, seed)
            for row in pool:
                row.split = split if row.patient in taken else 'train'
    return kept
