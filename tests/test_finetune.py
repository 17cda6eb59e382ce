"""finetune.py: statistics equal trusted ones, labels are read as published, no patient leaks, runs tell the truth."""
import json
import math
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pydicom
import pytest
import torch
from conftest import CASES, ROOT, run_here, run_ranks, write
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from PIL import Image

import finetune
import images
import metrics
import phantom
import vit
from finetune import Config, Row, resolved

cli, torchrun = partial(run_here, finetune), partial(run_ranks, 'finetune.py')
STATS = json.loads((CASES / 'stats.json').read_text())


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'')


def labels(dataset, root, task, **flags):
    """The adapter alone: {file name: label}, None where there is none."""
    rows = finetune.DATASETS[dataset](Config(dataset=dataset, root=str(root), task=task, **flags))
    return {os.path.relpath(row.path, root): row.label for row in rows}, rows


# ---- statistics ---------------------------------------------------------------------------------------------------

def test_statistics_equal_the_references():
    for c in STATS['delong']:
        a1, a2, p = metrics.delong(c['y'], c['s1'], c['s2'])
        assert (a1, a2, p) == pytest.approx((c['auc1'], c['auc2'], c['p']), abs=1e-9)
        assert metrics.delong_interval(c['y'], c['s1']) == pytest.approx(c['ci1'], abs=1e-9)
    for c in STATS['mcnemar']:
        discordant = c['table'][0][1] + c['table'][1][0]
        expected = c['exact'][1] if discordant < 25 else c['chi2_cc'][1]
        assert finetune.mcnemar(c['a'], c['b']) == pytest.approx(expected, abs=1e-9)
    for c in STATS['bh']:
        assert metrics.benjamini_hochberg(c['p']) == pytest.approx(np.array(c['p_adj']), abs=1e-9)
    for c in STATS['cls']:
        y, guess, C = c['y'], c['yhat'], c['C']
        assert metrics.f1(y, guess, C) == pytest.approx(c['f1_macro_all_labels'], abs=1e-9)
        assert metrics.f1(y, guess, C, 'weighted') == pytest.approx(c['f1_weighted'], abs=1e-9)
        assert metrics.f1(y, guess, C, 'micro') == pytest.approx(c['f1_micro'], abs=1e-9)
        assert metrics.kappa(y, guess, C) == pytest.approx(c['qwk'], abs=1e-9)


def test_auc_is_the_chance_that_a_positive_scores_higher():
    rng = np.random.default_rng(0)
    y, s = rng.integers(0, 2, 80), rng.integers(0, 6, 80)   # many ties
    pairs = [(a > b) + 0.5 * (a == b) for a, b in product(s[y == 1], s[y == 0])]
    assert metrics.auc(y, s) == pytest.approx(np.mean(pairs))
    fpr, tpr, _ = metrics.roc(y, s)
    assert np.trapezoid(tpr, fpr) == pytest.approx(np.mean(pairs))
    assert math.isnan(metrics.auc(np.ones(3), s[:3]))


def test_delong_of_equal_scores_is_one_and_of_perfect_ones_collapses():
    y, s = np.array([0, 0, 1, 1, 1]), np.array([.1, .4, .3, .8, .9])
    assert metrics.delong(y, s, s)[2] == 1
    assert metrics.delong(y, y, 2 * y) == (1, 1, 1)
    assert math.isnan(metrics.delong(y, y, -y)[2])         # no variance, so nothing to test against
    assert metrics.delong_interval(y, y) == (1, 1)


def test_mcnemar_counts_discordant_cases_only_and_is_exact_below_25():
    a, b = np.r_[np.ones(5), np.zeros(1), np.ones(50)], np.r_[np.zeros(5), np.ones(1), np.ones(50)]
    assert finetune.mcnemar(a, b) == pytest.approx(2 * (1 + 6) / 2 ** 6)                # Binom(6, 1/2) <= 1, twice
    assert finetune.mcnemar(a, a) == 1
    a, b = np.r_[np.ones(20), np.zeros(10)], np.r_[np.zeros(20), np.ones(10)]
    assert finetune.mcnemar(a, b) == pytest.approx(math.erfc(9 / math.sqrt(30) / math.sqrt(2)))


def test_f1_of_an_absent_class_is_zero_and_counts():
    assert metrics.f1([0, 1], [0, 1], 3) == pytest.approx(2 / 3)
    assert metrics.f1([0, 1], [0, 1], 3, 'weighted') == 1
    assert metrics.kappa([0, 0, 3], [0, 0, 3], 4) == 1 and math.isnan(metrics.kappa([1, 1], [1, 1], 4))
    with pytest.raises(ValueError, match='expected macro'):
        metrics.f1([0], [0], 2, 'samples')


def test_bootstrap_draws_patients_and_leaves_out_what_is_not_defined():
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    alone = metrics.bootstrap(np.mean, [x], np.arange(60), np.random.default_rng(1))
    copied = metrics.bootstrap(np.mean, [np.tile(x, 4)], np.tile(np.arange(60), 4), np.random.default_rng(1))
    assert copied == pytest.approx(alone)                   # four images of a patient are no four patients
    y, s = np.r_[1, np.zeros(9)], rng.normal(size=10)
    values = metrics.resample(metrics.auc, [y, s], np.arange(10), np.random.default_rng(0), 500)
    assert 0.2 < np.isnan(values).mean() < 0.5              # (1 - 1/10)^10 = .35 draws hold no positive; 5 sd = .11
    low, high = metrics.bootstrap(metrics.auc, [y, s], np.arange(10), np.random.default_rng(0), 500)
    assert low == np.percentile(values[~np.isnan(values)], 2.5) <= high
    assert metrics.bootstrap(metrics.auc, [y.tolist(), s.tolist()], list('abcdefghij'), np.random.default_rng(0),
                              500) == (low, high)
    assert all(map(math.isnan, metrics.bootstrap(metrics.auc, [y * 0, s], np.arange(10), rng, 20)))


# ---- risk ---------------------------------------------------------------------------------------------------------

def test_hazard_equals_the_reference_and_never_falls():
    z = np.load(CASES / 'hazard.npz')
    x, W, b = (torch.from_numpy(z[name]) for name in ('x', 'W', 'b'))
    p = finetune.hazard(x, W, b)
    assert p.numpy() == pytest.approx(z['dbt'], abs=2e-7) and (p.diff(dim=1) > 0).all()
    y, seen = torch.from_numpy(z['y']), torch.from_numpy(z['mask'])
    assert finetune.hazard_loss(finetune.cumulative(x, W, b), y, seen).item() == pytest.approx(z['loss_dbt'], abs=1e-6)
    for cancer, followed, *expected in zip(z['ytc'], z['ylf'], z['y'], z['mask']):
        got = finetune.follow_up(cancer, followed)
        assert (got[0] == expected[0]).all() and (got[1] == expected[1]).all()


def test_follow_up_counts_whole_years_and_leaves_out_what_was_not_observed():
    y, seen = finetune.follow_up(1.7, 9)
    assert y.tolist() == [0, 1, 1, 1, 1] and seen.tolist() == [1, 1, 0, 0, 0]
    y, seen = finetune.follow_up(math.inf, 3.9)
    assert y.tolist() == [0] * 5 and seen.tolist() == [1, 1, 1, 0, 0]
    assert finetune.follow_up(math.inf, 0.5) is None and finetune.follow_up(-1, 5) is None


def test_a_cancer_after_five_years_is_five_years_without_one(tmp_path):
    write(tmp_path / 'manifest.csv', ['path|patient|years_to_cancer|years_followup', 'a|1|7.5|', 'b|2|NaN|2', 'c|3||',
                                      'd|4|1|9'])
    rows = finetune.manifest(Config(root=str(tmp_path), task='risk'))
    assert [None if row.label is None else row.label.tolist() for row in rows] == [
        [0] * 5, [0, 0, -1, -1, -1], None, [0, 1, -1, -1, -1]]
    write(tmp_path / 'manifest.csv', ['path|patient|years_to_cancer|years_followup', 'a|1|-inf|3'])
    with pytest.raises(ValueError, match='line 2: .*frame and years must be numbers'):
        finetune.manifest(Config(root=str(tmp_path), task='risk'))


def test_hazard_loss_stays_finite_where_probabilities_saturate():
    y, seen = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2)
    for hazard in (1e-12, 1e-3, 1.0, 30.0, 500.0):
        H = torch.tensor([[hazard, hazard]], requires_grad=True)
        loss = finetune.hazard_loss(H, y, seen)
        loss.backward()
        assert loss.isfinite() and H.grad.isfinite().all()
    H = torch.rand(6, 5, dtype=torch.float64).cumsum(1) + 0.1
    y, seen = torch.randint(0, 2, (6, 5)).double(), torch.ones(6, 5, dtype=torch.float64)
    plain = torch.nn.functional.binary_cross_entropy(1 - torch.exp(-H), y)
    assert finetune.hazard_loss(H, y, seen).item() == pytest.approx(plain.item(), abs=1e-12)


def test_yearly_auc_takes_the_cancers_of_that_year_and_the_healthy_observed_by_then():
    #             cancer in year 1   year 2            healthy, 5 years  healthy, 1 year seen
    y = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    seen = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    p = np.array([[.5] * 5, [.2] * 5, [.3] * 5, [.9] * 5])
    areas = metrics.yearly_auc(y, seen, p)
    assert areas[0] == 0.5                                  # .5 against .3 and .9; year 2's cancer takes no part yet
    assert areas[1] == 0                                    # .2 against .3; the last one is no longer observed
    assert np.isnan(areas[2:]).all()


# ---- data sets as published ---------------------------------------------------------------------------------------

def test_rsna_labels_breasts_and_has_blanks(tmp_path):
    write(tmp_path / 'train.csv', [
        'site_id|patient_id|image_id|laterality|view|age|cancer|biopsy|invasive|BIRADS|implant|density|machine_id|'
        'difficult_negative_case',
        '2|10006|462822612|L|CC|61.0|0|0|0||0||29|False', '1|10011|541722628|R|AT|55|1|1|1|0.0|0|C|21|False'])
    got, rows = labels('rsna', tmp_path, 'cancer')
    assert got == {'train_images/10006/462822612.dcm': '0', 'train_images/10011/541722628.dcm': '1'}
    assert rows[1].view == 'AT' and rows[1].record['age'] == '55'
    assert list(labels('rsna', tmp_path, 'birads')[0].values()) == [None, '0'] and rows[1].split == ''
    assert list(labels('rsna', tmp_path, 'density')[0].values()) == [None, 'C']


VINDR = ['study_id|series_id|image_id|laterality|view_position|height|width|breast_birads|breast_density|split',
         's1|q|i1|L|CC|3518|2800|BI-RADS 4|DENSITY C|training', 's1|q|i2|L|MLO|3518|2800|BI-RADS 4|DENSITY C|training',
         's2|q|i3|R|CC|3518|2800|BI-RADS 5|DENSITY B|test']


def vindr(root):
    write(root / 'breast-level_annotations.csv', VINDR)
    write(root / 'finding_annotations.csv', [
        'study_id|series_id|image_id|laterality|view_position|height|width|breast_birads|breast_density|'
        'finding_categories|finding_birads|xmin|ymin|xmax|ymax|split',
        "s1|q|i1|L|CC|3518|2800|BI-RADS 4|DENSITY C|['Mass']|BI-RADS 4|10|10|20|20|training",
        "s1|q|i1|L|CC|3518|2800|BI-RADS 4|DENSITY C|['Suspicious Calcification', 'Mass']|BI-RADS 4|0|0|99.5|99|"
        "training",
        "s1|q|i2|L|MLO|3518|2800|BI-RADS 4|DENSITY C|['No Finding']|||||training"])


def test_vindr_has_lists_in_strings_and_no_cancer_label(tmp_path):
    vindr(tmp_path)
    assert labels('vindr', tmp_path, 'density')[0]['images/s1/i1.dicom'] == 'C'
    assert list(labels('vindr', tmp_path, 'birads')[0].values()) == ['4', '4', '5']
    assert list(labels('vindr', tmp_path, 'lesion')[0].values()) == ['1', '0', '0']
    got, rows = labels('vindr', tmp_path, 'lesion_type')
    assert list(got.values()) == ['Suspicious Calcification', None, None]
    assert [row.split for row in rows] == ['train', 'train', 'test']
    assert list(labels('vindr', tmp_path, 'cancer', cancer_rule='birads5')[0].values()) == ['0', '0', '1']
    assert list(labels('vindr', tmp_path, 'cancer', cancer_rule='birads45')[0].values()) == ['1', '1', '1']
    with pytest.raises(ValueError, match='no cancer label; choose a rule: --cancer_rule birads5 .* or birads45'):
        labels('vindr', tmp_path, 'cancer')


def ddsm(root):
    """A film with two masses, one whose second lesion is a calcification, a patient in training and test."""
    middle = ('mass shape|mass margins|assessment|pathology|subtlety|image file path|cropped image file path|'
              'ROI mask file path')

    def line(patient, side, view, number, kind, grade, verdict, name, density='3'):
        folder = f'{name}_{patient}_{side}_{view}'
        full, roi, crop = (f'{folder}{n}/000000.dcm' for n in ('/1.3.6/1.11', '_1/1.3.6/1.12', '_1/1.3.6/1.13'))
        roi, crop = (crop, roi) if number == 2 else (roi, crop)                         # swapped, as reported
        return f'{patient}|{density}|{side}|{view}|{number}|{kind}|x|x|{grade}|{verdict}|3|{full}|{roi}|"{crop}\n"'

    write(root / 'mass_case_description_train_set.csv', [
        f'patient_id|breast_density|left or right breast|image view|abnormality id|abnormality type|{middle}',
        line('P_00001', 'LEFT', 'CC', 1, 'mass', 3, 'BENIGN', 'Mass-Training'),
        line('P_00001', 'LEFT', 'CC', 2, 'mass', 5, 'MALIGNANT', 'Mass-Training'),
        line('P_00002', 'RIGHT', 'MLO', 1, 'mass', 4, 'BENIGN_WITHOUT_CALLBACK', 'Mass-Training'),
        line('P_00003', 'LEFT', 'CC', 1, 'mass', 0, 'BENIGN', 'Mass-Training', '0')])
    calc = middle.replace('mass shape|mass margins', 'calc type|calc distribution')
    write(root / 'calc_case_description_train_set.csv', [
        f'patient_id|breast density|left or right breast|image view|abnormality id|abnormality type|{calc}',
        line('P_00002', 'RIGHT', 'MLO', 1, 'calcification', 2, 'BENIGN', 'Calc-Training')])
    write(root / 'calc_case_description_test_set.csv', [
        f'patient_id|breast density|left or right breast|image view|abnormality id|abnormality type|{calc}',
        line('P_00003', 'LEFT', 'CC', 1, 'calcification', 4, 'MALIGNANT', 'Calc-Test')])
    for folder in ('Mass-Training_P_00001_LEFT_CC', 'Mass-Training_P_00001_LEFT_CC_1',
                   'Mass-Training_P_00002_RIGHT_MLO', 'Mass-Training_P_00003_LEFT_CC', 'Calc-Test_P_00003_LEFT_CC'):
        touch(root / 'CBIS-DDSM' / folder / '08-07-2016-DDSM' / '1.000000-images' / '1-1.dcm')


def test_ddsm_has_a_row_per_lesion_and_two_spellings_of_density(tmp_path):
    ddsm(tmp_path)
    got, rows = labels('ddsm', tmp_path, 'cancer')
    folder = 'CBIS-DDSM/Mass-Training_P_00001_LEFT_CC/08-07-2016-DDSM/1.000000-images/1-1.dcm'
    assert got[folder] == '1' and list(got.values()) == ['1', '0', '0', '1']            # not from the ROI folder, _1
    assert [(row.laterality, row.view, row.split) for row in rows[:2]] == [('L', 'CC', 'train'), ('R', 'MLO', 'train')]
    assert list(labels('ddsm', tmp_path, 'birads')[0].values()) == ['5', '4', '0', '4']
    assert list(labels('ddsm', tmp_path, 'density')[0].values()) == ['3', '3', None, '3']
    assert list(labels('ddsm', tmp_path, 'lesion_type')[0].values()) == ['mass', 'both', 'mass', 'calcification']


def test_an_official_split_that_leaks_keeps_its_test_set_and_says_so(tmp_path):
    ddsm(tmp_path)
    rows = finetune.ddsm(Config(dataset='ddsm', root=str(tmp_path), task='cancer'))
    for row in rows:
        row.label = int(row.label)
    rows += [Row('', i % 2, f'{split}{i}', '', split=split) for split in ('train', 'test') for i in range(20)]
    notes = []
    kept = finetune.assign(Config(dataset='ddsm'), rows, notes)
    assert {row.split for row in kept if row.patient == 'P_00003'} == {'test'} and len(rows) - len(kept) == 1
    assert '1 patients are in training and test' in notes[0] and '1 training images are dropped: P_00003' in notes[0]


def xlsx(path, sheets):
    """What Excel writes, as far as it matters: shared and inline strings, numbers, cells left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    relation = 'http://schemas.openxmlformats.org/officeDocument/2006/relationships'
    strings, files = [], {}
    for number, (name, lines) in enumerate(sheets.items(), 1):
        cells = ''
        for r, line in enumerate(lines, 1):
            cells += f'<row r="{r}">'
            for c, value in zip('ABCDEFGHIJKLMNOP', line):
                if isinstance(value, str) and value.startswith('!'):
                    cells += f'<c r="{c}{r}" t="inlineStr"><is><t>{value[1:]}</t></is></c>'
                elif isinstance(value, str) and value:
                    cells += f'<c r="{c}{r}" t="s"><v>{len(strings)}</v></c>'
                    strings.append(value)
                elif value != '':
                    cells += f'<c r="{c}{r}"><v>{value}</v></c>'
            cells += '</row>'
        files[f'xl/worksheets/sheet{number}.xml'] = f'<worksheet {space}><sheetData>{cells}</sheetData></worksheet>'
    names = ''.join(f'<sheet name="{name}" r:id="rId{i}"/>' for i, name in enumerate(sheets, 1))
    files['xl/workbook.xml'] = f'<workbook {space} xmlns:r="{relation}"><sheets>{names}</sheets></workbook>'
    links = ''.join(f'<Relationship Id="rId{i}" Target="worksheets/sheet{i}.xml"/>' for i in range(1, len(sheets) + 1))
    files['xl/_rels/workbook.xml.rels'] = f'<Relationships>{links}</Relationships>'
    files['xl/sharedStrings.xml'] = f'<sst {space}>' + ''.join(f'<si><r><t>{s[:1]}</t></r><r><t>{s[1:]}</t></r></si>'
                                                              for s in strings) + '</sst>'
    with zipfile.ZipFile(path, 'w') as book:
        for name, text in files.items():
            book.writestr(name, text)


def dicom(path, side, view):
    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = '1.2.840.10008.1.2.1'
    ds.file_meta.MediaStorageSOPClassUID = ds.file_meta.MediaStorageSOPInstanceUID = '1.2.3.4'
    ds.ImageLaterality, ds.ViewCodeSequence = side, Sequence([pydicom.Dataset()])
    ds.ViewCodeSequence[0].CodeMeaning = view
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, ds, enforce_file_format=True)


def test_cmmd_reads_sides_from_headers_and_labels_from_a_sheet(tmp_path):
    xlsx(tmp_path / 'CMMD_clinicaldata_revision.xlsx', {'Sheet1': [
        ['ID1', 'LeftRight', 'Age', 'number', 'abnormality', 'classification', 'subtype'],
        ['D1-0001', 'R', 44, 2, 'calcification', 'Benign', ''],
        ['D2-0007', 'L', 51, 2, 'both', 'Malignant', 'Luminal A'],
        ['D1-0202', 'L', 40, 2, 'mass', 'Benign', '']]})
    for patient, number, side, view in (
            ('D1-0001', 1, 'R', 'cranio-caudal'), ('D1-0001', 2, 'L', 'medio-lateral oblique'),
            ('D2-0007', 1, 'L', 'cranio-caudal'), ('D1-0202', 1, 'L', 'cranio-caudal')):
        dicom(tmp_path / 'CMMD' / patient / 'study' / 'series' / f'1-{number}.dcm', side, view)
    got, rows = labels('cmmd', tmp_path, 'cancer')
    assert list(got.values()) == ['0', None, None, '1']     # no row for the other breast; D1-0202 is a known duplicate
    assert [(row.laterality, row.view) for row in rows] == [('R', 'CC'), ('L', 'MLO'), ('', ''), ('L', 'CC')]
    assert list(labels('cmmd', tmp_path, 'cancer', cancer_rule='unlisted')[0].values()) == ['0', '0', None, '1']
    assert list(labels('cmmd', tmp_path, 'lesion')[0].values()) == ['1', '0', None, '1']
    assert list(labels('cmmd', tmp_path, 'lesion_type')[0].values()) == ['calcification', None, None, 'both']


def test_cesm_has_spaces_in_names_several_rows_and_grades_in_one_cell(tmp_path):
    head = ['Image_name', 'Patient_ID', 'Side', 'Type', 'Age', 'Breast density (ACR)', 'BIRADS', 'Findings', 'View',
            'Tags', 'Machine', 'Pathology Classification/ Follow up']
    xlsx(tmp_path / 'Radiology manual annotations.xlsx', {'key': [['x']], 'all': [
        head, ['P1_L_DM_MLO ', 1, 'L', 'DM', 55, 'C', '!4$5', 'Mass$calc', 'MLO', '', 1, 'Benign'],
        ['P1_L_DM_MLO ', 1, 'L', 'DM', 55, 'C', 3, 'Mass', 'MLO', '', 1, 'Malignant'],
        ['P1_L_CM_MLO', 1, 'L', 'CESM', 55, 'C', 4, 'Mass', 'MLO', '', 1, 'Malignant'],
        ['P2_R_DM_CC', 2, 'R', 'DM', 60, 'B', 1, '', 'CC', '', 1, 'Normal'],
        ['P3_R_DM_CC', 3, 'R', 'DM', 60, 'B', 6, '', 'CC', '', 1, 'Malignant']]})
    folder = 'Low energy images of CDD-CESM'
    touch(tmp_path / folder / 'P1_L_DM_MLO.jpg', tmp_path / folder / 'P2_R_DM_CC .jpg')
    got, rows = labels('cesm', tmp_path, 'cancer')
    assert got == {f'{folder}/P1_L_DM_MLO.jpg': '1', f'{folder}/P2_R_DM_CC .jpg': '0', f'{folder}/P3_R_DM_CC.jpg': '1'}
    assert list(labels('cesm', tmp_path, 'birads')[0].values()) == ['5', '1', None]
    assert list(labels('cesm', tmp_path, 'lesion')[0].values()) == ['1', '0', '1']
    assert list(labels('cesm', tmp_path, 'density')[0].values()) == ['C', 'B', 'B'] and rows[0].patient == '1'
    assert {row.split for row in rows} == {''}
    write(tmp_path / 'training_set_pathology.csv', ['Image_name|BIRADS', 'P1_L_DM_MLO |4', 'P2_R_DM_CC|1'])
    write(tmp_path / 'testing_set_pathology.csv', ['Image_name|BIRADS', 'P3_R_DM_CC|6'])
    assert [row.split for row in labels('cesm', tmp_path, 'cancer')[1]] == ['train', 'train', 'test']


def mias(root, n=40, image=None):
    """Every second patient has a lesion on one side; densities go round."""
    lines = ['MAMMOGRAPHIC IMAGE ANALYSIS SOCIETY', '', '=====']
    for i in range(1, n + 1):
        letter = 'FGD'[(i - 1) // 2 % 3]
        lines.append(f'mdb{i:03d} {letter} ' + ('CIRC M 535 425 197' if i % 4 == 1 else 'NORM '))
        if image is None:
            touch(root / f'mdb{i:03d}.pgm')
        else:
            Image.fromarray(image(i)).save(root / f'mdb{i:03d}.png')
    lines.append('mdb001 G CALC B 500 168 26')
    (root / 'Info.txt').write_text('\n'.join(lines) + '\n')


def test_mias_pairs_are_patients(tmp_path):
    mias(tmp_path, 6)
    got, rows = labels('mias', tmp_path, 'density')
    assert list(got.values()) == list('FFGGDD')
    assert [row.patient for row in rows] == ['001', '001', '002', '002', '003', '003']
    assert list(labels('mias', tmp_path, 'lesion')[0].values()) == list('100010')
    assert list(labels('mias', tmp_path, 'cancer')[0].values()) == list('100010')
    assert list(labels('mias', tmp_path, 'lesion_type')[0].values()) == ['CIRC', None, None, None, 'CIRC', None]


def test_a_manifest_takes_optional_columns_and_refuses_a_patient_in_two_splits(tmp_path):
    write(tmp_path / 'manifest.csv', ['path|patient|exam|laterality|view|split|frame|density|age',
                                      'a.png|p1|e1|left|cc|training||B|57', 'b.png|p2|e2|R|MLO|test|3|c|44'])
    got, rows = labels('csv', tmp_path, 'density')
    assert list(got.values()) == ['b', 'c']
    assert [(r.exam, r.laterality, r.view, r.split, r.frame) for r in rows] == [
        ('e1', 'L', 'CC', 'train', None), ('e2', 'R', 'MLO', 'test', 3)]
    with pytest.raises(ValueError, match='no column label or cancer; found path, patient'):
        labels('csv', tmp_path, 'cancer')
    write(tmp_path / 'short.csv', ['file|label', 'a|1'])
    with pytest.raises(ValueError, match='short.csv: no column path, patient; found file, label'):
        labels('csv', tmp_path / 'short.csv', 'cancer')
    rows = [Row('', i % 2, str(i // 2), '', split='train' if i % 8 else 'test') for i in range(40)]
    write(tmp_path / 'twice.csv', ['path|patient|label', 'a.png|1|0', './x/../a.png|2|1'])
    with pytest.raises(ValueError, match='line 3: ./x/../a.png stands in line 2 already'):
        labels('csv', tmp_path / 'twice.csv', 'cancer')
    with pytest.raises(ValueError, match='patients are in two splits, the first: 0 in test and train'):
        finetune.assign(Config(), rows, [])


def test_blank_labels_take_no_part_and_unknown_ones_are_refused(tmp_path):
    lines = ['path|patient|density|cancer', *(f'{i}.png|p{i}|{" abcd"[i % 5].strip()}|{i % 2}' for i in range(40))]
    write(tmp_path / 'manifest.csv', lines)
    touch(*(tmp_path / f'{i}.png' for i in range(40)))
    rows, _, notes = finetune.load(Config(root=str(tmp_path), task='density'))
    assert len(rows) == 32 and notes == ['8 of 40 images have no density label and take no part']
    write(tmp_path / 'manifest.csv', [line.replace('|1', '|yes') for line in lines])
    with pytest.raises(ValueError, match="1.png: cancer 'yes' is none of 0, 1"):
        finetune.load(Config(root=str(tmp_path), task='cancer'))
    ddsm(tmp_path / 'ddsm')
    path = tmp_path / 'ddsm' / 'mass_case_description_train_set.csv'
    path.write_text(path.read_text().replace('MALIGNANT', 'Malign'))
    with pytest.raises(ValueError, match="cancer 'Malign' is none of 0, 1"):
        finetune.load(Config(dataset='ddsm', root=str(tmp_path / 'ddsm'), task='cancer'))


def test_prepared_images_stand_in_for_published_ones(tmp_path):
    raw, prepared = tmp_path / 'raw', tmp_path / 'prepared'
    vindr(raw)
    touch(prepared / 'images' / 's1' / 'i1.npy')
    for root in (raw, raw / 'breast-level_annotations.csv'):
        cfg = Config(root=str(root), images=str(prepared))
        row = Row(f'{raw}/images/s1/i1.dicom', 0, 'p', name=os.path.relpath(raw / 'images/s1/i1.dicom', raw))
        assert finetune._prepared(cfg, row) == str(prepared / 'images' / 's1' / 'i1.npy')
    with pytest.raises(ValueError, match='lies outside .*, so --images cannot mirror it'):
        finetune._prepared(cfg, Row(f'{tmp_path}/a.png', 0, 'p', name='../a.png'))


@pytest.mark.parametrize('dataset, task, words', [
    ('rsna', 'lesion', 'RSNA has no lesion labels'), ('ddsm', 'lesion', 'no normal breasts'),
    ('cmmd', 'birads', 'TOMPEI'), ('mias', 'birads', 'F G D'), ('vindr', 'risk', 'no follow-up')])
def test_a_task_that_a_data_set_does_not_define_is_refused_with_the_reason(dataset, task, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        finetune.load(Config(dataset=dataset, root=str(tmp_path), task=task))


# ---- splits and units ---------------------------------------------------------------------------------------------

def test_a_split_is_by_patient_and_label_and_always_the_same():
    rows = [Row('', int(i % 10 == 0), f'p{i // 2}', '') for i in range(400)]

    def parts(rows, seed=0):
        return {row.patient: row.split for row in finetune.assign(Config(seed=seed), rows, [])}

    backwards, fresh = ([replace(row) for row in part] for part in (rows[::-1], rows))
    assert parts(rows) == parts(backwards) != parts(fresh, seed=1)
    of = {split: [row for row in rows if row.split == split] for split in ('train', 'val', 'test')}
    assert [len(of[s]) for s in ('train', 'val', 'test')] == [256, 64, 80]
    assert sum(row.label for row in of['test']) == 8        # a fifth of the 40 positive patients
    units = [finetune.Unit('', row.patient, 'train', row.label, [], {}) for row in of['train']]
    small, large = (finetune.drawn(units, share, 0, math.ceil) for share in (0.1, 0.5))
    assert small < large and len(small) == 13 + 1           # a tenth of 102 and of 26 patients, rounded up


def test_splits_that_cannot_be_learnt_from_are_refused():
    rows = [Row('', i % 2, str(i), '') for i in range(40)]
    with pytest.raises(ValueError, match="splits 'holdout': expected train, val and test"):
        finetune.assign(Config(), [replace(row, split='holdout') for row in rows], [])
    units = [finetune.Unit('', str(i), split, i % 2, [], {}) for split in ('train', 'val', 'test') for i in range(4)]
    assert [len(part) for part in finetune.parted(units).values()] == [4, 4, 4]
    with pytest.raises(ValueError, match='the train split is empty'):
        finetune.parted(units[4:])
    with pytest.raises(ValueError, match='the test split holds one class only'):
        finetune.parted([unit for unit in units if unit.split != 'test' or unit.label])


def test_views_stand_in_the_order_of_dbt_dino_and_missing_ones_are_named():
    rows = [Row(f'{side}{view}', 1, 'p', side, view, 'train', exam) for exam in ('e1', 'e2') for side in 'LR'
            for view in ('MLO', 'CC') if (exam, side, view) != ('e2', 'L', 'CC')]
    rows.append(Row('x', 1, 'p', 'L', 'AT', 'train', 'e1'))
    notes = []
    cfg = Config(level='exam', pool='cls_mean')
    units = finetune.units_of(cfg, rows, notes)
    assert [unit.name for unit in units] == ['p/e1', 'p/e2']
    assert [sorted(slot for _, slot in unit.rows) for unit in units] == [[0, 1, 2, 3], [0, 2, 3]]
    assert [rows[i].path for i, _ in sorted(units[0].rows, key=lambda r: r[1])] == ['RCC', 'LCC', 'RMLO', 'LMLO']
    assert finetune.missing_views(cfg, rows, units) == {'p/e2': ['LCC']}
    assert notes == ['images of views other than RCC, LCC, RMLO, LMLO take no part at exam level: LAT 1']
    stats = torch.arange(len(rows) * 4.0).view(len(rows), 4, 1)
    x = finetune.unit_features(cfg, units, stats)
    four = dict(zip([(r.exam, r.path) for r in rows], stats[:, 0, 0].tolist()))
    assert x[0].tolist() == [four['e1', v] for v in ('RCC', 'LCC', 'RMLO', 'LMLO')]
    assert x[1, 1] == pytest.approx(np.mean([four['e2', v] for v in ('RCC', 'RMLO', 'LMLO')]))


def test_blank_views_and_mixed_lesion_types_are_told():
    with pytest.raises(ValueError, match='laterality or view is blank; --level breast needs both'):
        finetune.units_of(Config(level='breast'), [Row('a', 1, 'p', 'p')], [])
    rows = [Row(view, label, 'p', 'L', view) for label, view in enumerate(('CC', 'MLO'))]
    notes = []
    assert finetune.units_of(Config(level='breast', task='lesion_type'), rows, notes) == []
    assert '1 breasts hold lesions of several types' in notes[0]
    assert finetune.units_of(Config(level='breast', task='birads'), rows, [])[0].label == 1


# ---- features -----------------------------------------------------------------------------------------------------

TINY = dict(size=28, width=16, depth=1, heads=2, layerscale=1.0)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Twelve images and a volume of seven slices, one of the images broken."""
    where = tmp_path_factory.mktemp('files')
    for i in range(12):
        np.save(where / f'{i:02d}.npy', phantom.breast(np.random.default_rng(i), height=40, width=30).volume[0])
    np.save(where / 'volume.npy', phantom.breast(np.random.default_rng(99), 7, 40, 30).volume)
    (where / '05.npy').write_bytes(b'broken')
    return [str(path) for path in sorted(where.glob('*.npy'))]


def test_streamed_statistics_are_those_of_all_tokens_at_once(files, group, capsys):
    torch.manual_seed(0)
    encoder = vit.ViT(**TINY)
    rows = [Row(path, 0, '', '') for path in files]
    cfg = Config(level='image', chunk=3, workers=0)
    got = finetune.features(cfg, encoder, rows, finetune.units_of(cfg, rows, []), torch.device('cpu'), cache=False)
    assert '05.npy' in capsys.readouterr().err and got[5].isnan().all() and not got[6].isnan().any()
    images, single = (torch.from_numpy(finetune.Images(cfg, rows, 28)[i, False][1]) for i in (12, 0))
    with torch.no_grad():
        cls, patches = encoder(images.unsqueeze(1) / 255)
        single = encoder(single.unsqueeze(1) / 255)[0]
    tokens = patches.flatten(0, 1)                                                      # (7 * 4, D)
    for mine, whole in zip(got[12], (cls.mean(0), tokens.mean(0), cls.std(0), tokens.std(0))):
        assert mine == pytest.approx(whole.numpy(), abs=1e-5)
    assert got[0][0] == pytest.approx(single[0].numpy(), abs=1e-5) and (got[0][2] < 1e-5).all()


def test_slices_are_evenly_spaced_and_a_frame_is_itself(files):
    volume = np.load(files[12])
    for slices, taken in ((3, [1, 3, 5]), (0, range(7)), (9, range(7))):
        _, images = finetune.Images(Config(slices=slices), [Row(files[12], 0, '', '')], 28)[0, False]
        assert len(images) == len(taken)
        for image, k in zip(images, taken):
            assert (image == np.asarray(Image.fromarray(volume[k]).resize((28, 28), Image.Resampling.BICUBIC))).all()
    assert len(finetune.Images(Config(), [Row(files[12], 0, '', '', frame=4)], 28)[0, False][1]) == 1


def test_features_are_cached_by_file_and_weights(files, group, tmp_path, monkeypatch):
    rows = [Row(path, 0, '', '') for path in files[:4]]
    cfg, cpu = Config(level='image', cache=str(tmp_path), workers=0), torch.device('cpu')
    units = finetune.units_of(cfg, rows, [])
    encoder = vit.ViT(**TINY)
    first = finetune.features(cfg, encoder, rows, units, cpu)
    monkeypatch.setattr(images, 'read', None)                 # a second reading would fail
    assert (finetune.features(cfg, encoder, rows, units, cpu) == first).all()
    monkeypatch.undo()
    with torch.no_grad():
        encoder.norm.bias += 1
    assert (finetune.features(cfg, encoder, rows, units, cpu)[:, :2] != first[:, :2]).all()
    assert len(list(tmp_path.glob('*/*.npy'))) == 8 and not list(tmp_path.glob('*/*.*.npy'))
    for path in tmp_path.glob('*/*.npy'):
        path.write_bytes(b'')                               # a damaged cache is made anew
    assert not finetune.features(cfg, encoder, rows, units, cpu).isnan().any()


# ---- heads --------------------------------------------------------------------------------------------------------

def test_the_mlp_has_three_layers_and_the_linear_head_one():
    assert len(finetune.Head('mlp', 8, 3).layers) == 3 and len(finetune.Head('linear', 8, 3).layers) == 1
    H = finetune.Head('hazard', 8, 5)(torch.randn(4, 8))
    assert H.shape == (4, 5) and (H.diff(dim=1) > 0).all()


def test_standardizing_leaves_out_what_does_not_vary():
    head = finetune.Head('linear', 3, 2)
    x = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 4.0], [5.0, 5.0, 8.0]])
    head.standardize(x)
    z = (x - head.shift) * head.scale
    assert z.mean(0) == pytest.approx(np.zeros(3), abs=1e-6) and z.std(0).tolist() == pytest.approx([1, 0, 1])


def test_rare_classes_weigh_as_much_as_common_ones():
    weight = finetune.class_weights(Config(), torch.tensor([0] * 9 + [1]))
    assert weight[:9].sum() == pytest.approx(weight[9:].sum()) and weight.mean() == pytest.approx(1)
    assert finetune.class_weights(Config(balance=False), torch.tensor([0, 0, 1])).tolist() == [1, 1, 1]
    risk = torch.tensor([[0, 1, -1, -1, -1], [0] * 5, [0] * 5, [0, 0, -1, -1, -1]])
    weight = finetune.class_weights(Config(task='risk'), risk)
    assert weight[0] == pytest.approx(weight[1:].sum())


def test_the_loss_of_a_batch_counts_its_rare_cases_as_rare_cases():
    """Over the batches of an epoch the mean of the losses is the loss of the epoch, whatever class a batch holds."""
    cfg, y = Config(task='cancer'), torch.tensor([0] * 12 + [1] * 4)
    outputs, weight = torch.randn(16, 2), finetune.class_weights(cfg, y)
    parts = [finetune.criterion(cfg, outputs[i:i + 4], y[i:i + 4], weight[i:i + 4]) for i in range(0, 16, 4)]
    assert torch.stack(parts).mean().item() == pytest.approx(finetune.criterion(cfg, outputs, y, weight).item())
    cfg, y = Config(task='risk'), torch.tensor([[0] * 5] * 12 + [[0, 1, -1, -1, -1]] * 4)
    H, weight = torch.rand(16, 5).cumsum(1), finetune.class_weights(cfg, y)
    parts = [finetune.criterion(cfg, H[i:i + 4], y[i:i + 4], weight[i:i + 4]) for i in range(0, 16, 4)]
    assert torch.stack(parts).mean().item() == pytest.approx(finetune.criterion(cfg, H, y, weight).item())


def test_a_batch_without_a_readable_file_weighs_nothing():
    units, part = [finetune.Unit('', '', '', 0, [(i, i)], {}) for i in (0, 1)], [(0, False), (1, False)]
    images, _, _, there = finetune.collated(units, part, [(0, None), (1, None)], 28, 2)
    assert there.tolist() == [0, 0] and images.shape == (1, 28, 28)
    volume = np.ones((2, 28, 28), np.uint8)
    images, owner, place, there = finetune.collated(units, part, [(0, None), (1, volume)], 28, 2)
    assert there.tolist() == [0, 1] and owner.tolist() == [0, 0] and place.tolist() == [3]


def test_the_random_row_sees_the_image_whatever_layerscale_pretraining_starts_from(group, tmp_path):
    model = vit.ViT(**TINY | dict(layerscale=1e-5))
    torch.save(dict(vit=model.config, teacher={f'backbone.{k}': v for k, v in model.state_dict().items()}),
               tmp_path / 'last.pt')
    random = finetune.encoder_from(Config(encoder=str(tmp_path / 'last.pt')), None)
    assert (random.blocks[0].ls1.gamma == 1).all() and random.config == model.config


def test_the_search_keeps_the_rate_with_the_least_validation_loss():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(120, 6, generator=rng)
    y = (x[:, 0] > 0).long()
    cfg = resolved(Config(task='cancer', search=4, epochs=8))
    head, tried = finetune.fit(cfg, ('0', '1'), x[:80], y[:80], x[80:], y[80:])
    loss = finetune.criterion(cfg, head(x[80:]), y[80:], finetune.class_weights(cfg, y[80:])).item()
    assert len(tried) == 4 and loss == pytest.approx(min(tried.values()), abs=1e-6)
    assert all(1e-5 <= float(lr) <= 1e-2 for lr in tried)


def test_neighbours_vote_by_cosine_and_their_shares_sum_to_one():
    x = torch.eye(4).repeat_interleave(3, 0) + 0.01
    head = finetune.Neighbours(x, torch.arange(4).repeat_interleave(3), 5, 3)
    p = head(torch.eye(4)).softmax(-1)
    assert p.argmax(1).tolist() == [0, 1, 2, 3] and (p[:, 4] < 1e-6).all()
    assert p.sum(1).tolist() == pytest.approx([1] * 4)


@pytest.mark.parametrize('flags, words', [
    (dict(head='hazard', task='cancer'), 'risk and the hazard head belong together'),
    (dict(head='linear', task='risk'), 'risk and the hazard head belong together'),
    (dict(dataset='inbreast'), '--dataset inbreast: expected rsna, vindr'),
    (dict(dataset='mias', level='exam'), 'MLO views only'),
    (dict(fraction=(0.0, 1.0)), '--fraction 0.0'), (dict(head='knn', freeze=False), 'trains nothing'),
    (dict(lr=-1.0), '--lr -1.0 must be above 0'), (dict(lr=0.0), '--lr 0.0 must be above 0'),
    (dict(classes=('a', 'b', 'c')), 'takes two, the negative first'),
    (dict(head='mlp', search=3), 'tries heads on frozen features'), (dict(epochs=0), 'trains nothing')])
def test_what_cannot_work_is_refused_at_once(flags, words):
    with pytest.raises(ValueError, match=words):
        resolved(Config(**flags))


def test_defaults_follow_the_papers():
    linear, mlp, risk = (resolved(Config(head=head, task=task)) for head, task in (
        ('linear', 'density'), ('mlp', 'cancer'), ('hazard', 'risk')))
    assert (linear.freeze, linear.epochs, linear.pool) == (True, 75, 'patch_mean_std')
    assert (linear.wd, linear.batch, linear.draws) == (1e-4, 64, 1000)
    assert (mlp.freeze, mlp.pool) == (False, 'cls_mean')
    assert (risk.epochs, risk.level, risk.freeze) == (100, 'exam', True)
    assert finetune.SLOTS['exam'] == ('RCC', 'LCC', 'RMLO', 'LMLO')


# ---- whole runs ---------------------------------------------------------------------------------------------------

FAST = ['--workers', '0', '--draws', '60', '--epochs', '4']


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    """A checkpoint as pretrain.py writes it, of a tiny encoder."""
    path = tmp_path_factory.mktemp('encoder') / 'last.pt'
    torch.manual_seed(3)
    model = vit.ViT(**TINY)
    torch.save(dict(vit=model.config, config=dict(layerscale=1.0),
                    teacher={f'backbone.{k}': v for k, v in model.state_dict().items()}), path)
    return path


@pytest.fixture(scope='module')
def exams(tmp_path_factory):
    """Forty exams of four views, two of them incomplete, as a manifest with density, cancer, risk and age; a few views
    are volumes. Brightness tells cancer, so that something can be learnt."""
    where = tmp_path_factory.mktemp('exams')
    lines = ['path|patient|exam|laterality|view|density|cancer|years_to_cancer|years_followup|age']
    for i in range(40):
        rng = np.random.default_rng(i)
        sick = i % 2
        for side, view in product('LR', ('CC', 'MLO')):
            if (i, side) == (3, 'L') or (i, side, view) == (8, 'R', 'MLO'):
                continue
            volume = phantom.breast(rng, 3 if i % 10 == 0 else 1, 40, 30, density=i % 4).volume // (1 if sick else 3)
            np.save(where / f'{i}{side}{view}.npy', volume if len(volume) > 1 else volume[0])
            lines.append(f"{i}{side}{view}.npy|p{i}|e{i}|{side}|{view}|{'abcd'[i % 4]}|{sick}|"
                         f"{i % 5 if sick else ''}|{1 + i % 7}|{40 + i}")
    write(where / 'manifest.csv', lines)
    return where


@pytest.fixture(scope='module')
def risk(exams, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp('risk') / 'run'
    cli('--root', exams, '--task', 'risk', '--head', 'hazard', '--encoder', encoder, '--out', out, *FAST,
        '--cache', out / 'cache')
    return out


def results(out, name='pretrained', share=1):
    r = json.loads((out / 'metrics.json').read_text())
    found, = (result for result in r['results'] if (result['encoder'], result['share']) == (name, share))
    return r, {metric: m['value'] for metric, m in found['metrics'].items()}


def test_the_demo_runs_both_tasks_and_says_what_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli('--phantoms', 80, '--search', 2, *FAST)
    text = capsys.readouterr().out
    assert 'SMOKE RUN ON PHANTOMS' in text and 'runs/demo/last.pt is absent: random init only' in text
    for task, metric in (('density', 'accuracy'), ('cancer', 'AUC')):
        out = tmp_path / 'runs' / 'finetune-demo' / task
        r, values = results(out, 'random init')
        assert metric in values and r['n'] == 32 and len(r['results'][0]['tried']) == 2
        for name in ('roc.png', 'confusion.png'):
            assert np.array(Image.open(out / name)).std() > 10
        assert len((out / 'predictions.csv').read_text().splitlines()) == 33
    cli('--phantoms', 80, *FAST)                            # the demo may be run again


def test_an_exam_run_names_missing_views_and_reports_every_year(risk, capsys):
    r, values = results(risk)
    assert list(values) == ['mean AUROC', *(f'year {t}' for t in range(1, 6))]
    assert r['missing_views'] == {'p3/e3': ['LCC', 'LMLO'], 'p8/e8': ['RMLO']} and r['config']['level'] == 'exam'
    assert list(r['counts']) == [f'year {t}' for t in range(1, 6)]
    lines = finetune.table(risk / 'predictions.csv', 'p_year 1', 'p_year 5')
    assert len(lines) == 2 * r['n'] and all(float(x['p_year 1']) <= float(x['p_year 5']) for x in lines)
    assert 'exams that lack a view' in r['notes'][-1] and 'p3/e3 (LCC LMLO), p8/e8 (RMLO)' in r['notes'][-1]


def test_two_ranks_give_the_result_of_one(risk, exams, encoder, tmp_path):
    rc, text = torchrun(2, '--root', exams, '--task', 'risk', '--head', 'hazard', '--encoder', encoder, '--out',
                        tmp_path / 'run', *FAST, '--cache', tmp_path / 'cache')
    assert rc == 0, text
    one, two = (finetune.stored(out)['p'] for out in (risk, tmp_path / 'run'))
    assert two == pytest.approx(one, abs=1e-5)


@pytest.fixture(scope='module')
def tuned(exams, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp('tuned') / 'run'
    cli('--root', exams, '--task', 'cancer', '--head', 'mlp', '--encoder', encoder, '--out', out, *FAST, '--batch', 16,
        '--micro_batch', 4, '--hidden', 16, '--slices', 2, '--level', 'breast', '--lr', 1e-3)
    return out


def test_finetuning_moves_the_encoder_and_learns(tuned, encoder):
    before, after = vit.load(encoder).state_dict(), vit.load(tuned / 'last.pt').state_dict()
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert moved['blocks.0.attn.qkv.weight'] > 1e-5 and moved['mask_token'] == 0
    r, values = results(tuned)
    assert values['AUC'] > 0.9 and r['config']['level'] == 'breast' and r['config']['freeze'] is False


def test_finetuning_on_two_ranks_is_finetuning_on_one(tuned, exams, encoder, tmp_path):
    rc, text = torchrun(2, '--root', exams, '--task', 'cancer', '--head', 'mlp', '--encoder', encoder, '--out',
                        tmp_path / 'run', *FAST, '--batch', 16, '--micro_batch', 4, '--hidden', 16, '--slices', 2,
                        '--level', 'breast', '--lr', 1e-3)
    assert rc == 0, text
    one, two = (vit.load(out / 'last.pt').state_dict() for out in (tuned, tmp_path / 'run'))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-3


def test_fractions_subgroups_and_a_row_for_dinov2(exams, encoder, tmp_path, capsys):
    cli('--root', exams, '--task', 'cancer', '--head', 'knn', '--encoder', encoder, '--dinov2', encoder, '--out',
        tmp_path / 'run', *FAST, '--cache', tmp_path / 'cache', '--fraction', '0.5', '1.0', '--subgroup', 'Age')
    text = capsys.readouterr().out
    r, _ = results(tmp_path / 'run')
    assert [(result['encoder'], result['share']) for result in r['results']] == list(product(
        ('random init', 'DINOv2', 'pretrained'), (0.5, 1)))
    assert (tmp_path / 'run' / 'fraction.png').exists()
    assert set(r['subgroups']) <= {'<50', '50-60', '60-70', '70+'}
    assert sum(g['n'] for g in r['subgroups'].values()) == r['n']
    for words in ('pretrained, 50%', 'pretrained - DINOv2, 100%: AUC', 'pretrained - random init, 50%'):
        assert words in text
    assert len(r['against']) == 4 and all(0 <= p <= 1 for v in r['against'].values() for p in v['adjusted'].values())
    for v in r['against'].values():                         # several images of a patient are no independent cases
        assert list(v['tests']) == ['bootstrap by patient'] and list(v['naive']) == ['DeLong']
    with pytest.raises(ValueError, match='--subgroup race: no such column; found path, patient'):
        cli('--root', exams, '--task', 'cancer', '--head', 'knn', '--encoder', encoder, '--out', tmp_path / 'two',
            *FAST, '--cache', tmp_path / 'cache', '--subgroup', 'race')


def test_compare_tests_equal_units_and_adjusts_all_p_values(risk, tuned, exams, encoder, tmp_path, capsys):
    for name, pool in (('a', 'cls_mean'), ('b', 'patch_mean_std')):
        cli('--root', exams, '--task', 'density', '--pool', pool, '--encoder', encoder, '--out', tmp_path / name, *FAST,
            '--cache', tmp_path / 'cache')
    capsys.readouterr()
    cli('compare', tmp_path / 'a', tmp_path / 'b', tuned, risk, '--out', tmp_path / 'radar.png')
    text = capsys.readouterr().out
    assert 'tests: 1, one family' in text and 'McNemar' in text
    assert np.array(Image.open(tmp_path / 'radar.png')).std() > 10
    axes, polygons = finetune.web({str(f): finetune.stored(f) for f in (tmp_path / 'a', tuned, risk)})
    assert axes == ['cancer', 'density', 'risk'] and list(polygons) == ['random init, mean of the runs', str(encoder)]
    with pytest.raises(ValueError, match='not a run of finetune.py'):
        cli('compare', tmp_path / 'a', tmp_path)


def test_predict_reads_an_image_or_an_exam(risk, exams, encoder, tmp_path, capsys):
    files = [f'{side}{view}={exams}/5{side}{view}.npy' for side, view in product('RL', ('CC', 'MLO'))]
    cli('predict', *files, '--checkpoint', risk)
    line = capsys.readouterr().out.splitlines()[0]
    values = [float(part.split()[-1]) for part in line.split(', ')]
    assert len(values) == 5 and values == sorted(values)
    stored = finetune.stored(risk)
    if 'p5/e5' in stored['units']:
        assert values == pytest.approx(stored['p'][stored['units'].index('p5/e5')], abs=1e-3)
    cli('predict', *files[:2], '--checkpoint', risk)
    assert 'missing LCC, LMLO' in capsys.readouterr().out
    with pytest.raises(ValueError, match='this model reads exams: give VIEW=FILE with VIEW of RCC, LCC, RMLO, LMLO'):
        cli('predict', f'{exams}/5LCC.npy', '--checkpoint', risk)
    state = torch.load(risk / 'last.pt', weights_only=True)
    wide = vit.ViT(**TINY | dict(width=32))
    torch.save(state | dict(vit=wide.config, teacher={f'backbone.{k}': v for k, v in wide.state_dict().items()}),
               tmp_path / 'wide.pt')
    with pytest.raises(ValueError, match='wide.pt: .* its head and encoder do not fit together'):
        cli('predict', *files, '--checkpoint', tmp_path / 'wide.pt')
    with pytest.raises(ValueError, match='holds an encoder without a head'):
        cli('predict', f'{exams}/5LCC.npy', '--checkpoint', encoder)


def test_predict_repeats_the_predictions_of_the_run(exams, encoder, tmp_path, capsys):
    for head in ('linear', 'knn'):
        out = tmp_path / head
        cli('--root', exams, '--task', 'density', '--head', head, '--encoder', encoder, '--out', out, *FAST, '--cache',
            tmp_path / 'cache')
        run = finetune.stored(out)
        capsys.readouterr()
        cli('predict', exams / run['units'][0], '--checkpoint', out)
        line = capsys.readouterr().out.splitlines()[0]
        assert [float(part.split()[-1]) for part in line.split(', ')] == pytest.approx(run['p'][0], abs=1e-3)


@pytest.mark.parametrize('spoil, words', [
    (lambda lines: [line.replace('|a|', '|x|') for line in lines], "density 'x' is none of a, b, c, d"),
    (lambda lines: [lines[0].replace('density', 'class'), *lines[1:]], 'no column label or density'),
    (lambda lines: lines[:1], 'a header and no rows'),
    (lambda lines: [lines[0], *('gone/' + line for line in lines[1:])],
     'files that the labels name are missing, the first: .*gone')])
def test_bad_manifests_are_refused_in_one_sentence(spoil, words, exams, encoder, tmp_path):
    lines = [line.replace(',', '|') for line in (exams / 'manifest.csv').read_text().splitlines()]
    write(tmp_path / 'manifest.csv', spoil(lines))
    for path in exams.glob('*.npy'):
        os.symlink(path, tmp_path / path.name)
    with pytest.raises(ValueError, match=words) as problem:
        cli('--root', tmp_path, '--task', 'density', '--encoder', encoder, '--out', tmp_path / 'run', *FAST)
    assert '\n' not in str(problem.value)


def test_a_run_is_not_overwritten_and_a_wrong_encoder_is_named(risk, exams, encoder, tmp_path):
    with pytest.raises(ValueError, match='holds a run; choose another --out'):
        cli('--root', exams, '--task', 'density', '--encoder', encoder, '--out', risk, *FAST)
    with pytest.raises(ValueError, match='nowhere.pt: no such file; --encoder takes'):
        cli('--root', exams, '--task', 'density', '--encoder', 'nowhere.pt', '--out', tmp_path / 'run', *FAST)
    torch.save(dict(x=torch.zeros(1)), tmp_path / 'other.pt')
    with pytest.raises(ValueError, match='no ViT in it'):
        cli('--root', exams, '--task', 'density', '--encoder', tmp_path / 'other.pt', '--out', tmp_path / 'run', *FAST)


def test_training_that_diverges_is_no_result(exams, encoder, tmp_path):
    for head in ('linear', 'mlp'):
        with pytest.raises(ValueError, match='the validation loss was never finite; lower --lr'):
            cli('--root', exams, '--task', 'cancer', '--head', head, '--lr', 1e30, '--encoder', encoder, '--out',
                tmp_path / head, *FAST, '--cache', tmp_path / 'cache')


def test_a_split_that_cannot_be_read_ends_the_run_in_words(exams, encoder, tmp_path):
    lines = (exams / 'manifest.csv').read_text().splitlines()
    splits = ['split', *(f"{'train val test'.split()[int(line.split(',')[1][1:]) % 7 % 3]}" for line in lines[1:])]
    (tmp_path / 'manifest.csv').write_text('\n'.join(f'{a},{b}' for a, b in zip(lines, splits)) + '\n')
    for line, split in zip(lines[1:], splits[1:]):
        path = tmp_path / line.split(',')[0]
        path.write_bytes(b'broken' if split == 'val' else (exams / path.name).read_bytes())
    with pytest.raises(ValueError, match='the val split is empty.*after the unreadable files were left out'):
        cli('--root', tmp_path, '--task', 'cancer', '--encoder', encoder, '--out', tmp_path / 'run', *FAST, '--cache',
            tmp_path / 'cache', '--max_bad', 0.9)


@pytest.mark.parametrize('script', ['pretrain', 'finetune'])
def test_help_is_printed(script):
    done = subprocess.run([sys.executable, str(ROOT / f'{script}.py'), '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and '--seed' in done.stdout and '45 % train' in done.stdout or script == 'pretrain'


def test_an_error_is_one_sentence_on_the_terminal(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / 'finetune.py'), '--root', str(tmp_path), '--dataset', 'rsna'],
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith('finetune.py: ') and 'train.csv: no such file' in done.stderr
    assert 'Traceback' not in done.stderr
