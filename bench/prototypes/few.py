"""A four-layer 8B: kernels of few rows, old beside new. few.py ROWS... -- VARIANT..."""
import sys, dataclasses; sys.path[:0] = ['bench', 'src']
import numpy as np
from pathlib import Path
import headrace.synth as synth, gpu, headrace
from headrace.gguf.reader import open_gguf
from headrace.model.loader import load_decoder
from headrace.cuda.runner import CUDARunner
from headrace.cuda.steps import Step
import headrace.cuda.skinny as SK
from headrace.backend import Batch
VOCAB = 16384
def mini(name='llama-8b', layers=4):
    p = Path(f'/tmp/mini-{name}.gguf'); s = synth.SHAPES[name]; f = dataclasses.fields(s)
    synth.SHAPES['mini'] = dataclasses.replace(s, **{f[1].name: layers, f[7].name: VOCAB})
    if not p.exists(): synth.write_synthetic(p, 'mini', 'Q4_K_M')
    return load_decoder(open_gguf(p))
def measure(runner, n):
    ex = runner.executor; dev = ex.device
    pos = np.zeros(n, np.int32); slots = np.arange(n, dtype=np.int32)
    ex.bring(Batch(pos + 5, pos, slots, slots[:, None], np.array([n - 1], np.int32)))
    step = Step(n, 64, ((0, n),))
    found, ops = {}, []
    for op in runner.decoder.operations:
        ls = list(ex.lowering.lower(op, step)); ops.append((type(op).__name__, ls))
        for l in ls: found.setdefault(type(op).__name__ + ('*' if l.spec.name in ('rotations',) else ''), []).append(l)
    dev.prepare(l.spec for _, ls in ops for l in ls)
    def t(ls):
        g = dev.capture(lambda: [dev.launch(l) for l in ls]); us = gpu.timed(dev, g.launch)['median']; g.close(); return us
    out, rates = {}, {}
    for k, ls in found.items():
        rep = ls * (-(-32 // len(ls))); out[k] = t(rep) / len(rep)
        rates[k] = sum(gpu.weight_bytes(l, runner) for l in ls) / len(ls) / out[k] / 1e3
    head = [l for nme, ls in ops for l in ls if nme == 'Head']
    embed = [l for nme, ls in ops for l in ls if nme == 'Embed']
    layers = [l for nme, ls in ops for l in ls if nme not in ('Head', 'Embed')]
    step_us = t(embed + layers * 8) + out['Head'] * 128256 / VOCAB
    return out, rates, step_us
NAMES = ('ProjectQKV', 'Attend', 'ProjectOut', 'FeedForwardIn', 'FeedForwardOut', 'Head')
if __name__ == '__main__':
    i = sys.argv.index('--'); rows = [int(a) for a in sys.argv[1:i]]
    print(headrace.__file__)
    d = mini()
    print(f"{'variant':14} rows " + ' '.join(f'{k[:12]:>17}' for k in NAMES) + '   32-layer step')
    for variant in sys.argv[i + 1:]:
        how = dict(kv.split('=') for kv in variant.split(',') if '=' in kv)
        old = variant.startswith('old')
        saved = {k: getattr(SK, k) for k in how}
        for k, v in how.items(): setattr(SK, k, int(v))
        try:
            r = CUDARunner(d, max_rows=64, tensor_rows=8, few_rows=range(0) if old else range(2, 17), prompt_rows=1024); r.allocate_cache(80)
            for n in rows:
                out, rates, us = measure(r, n)
                print(f"{variant:14} {n:4} " + ' '.join(f'{out[k]:8.1f} {rates.get(k, 0):5.0f}GB' for k in NAMES) + f'   {us:8.0f} us {n * 1e6 / us:7.0f} tok/s', flush=True)
            r.close()
        except Exception as e:
            print(variant, 'FAILED', repr(e)[:600])
        for k, v in saved.items(): setattr(SK, k, v)
