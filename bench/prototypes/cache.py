"""f16 and q8_0 side by side: a four-layer 8B, decode by depth, kernels one by one."""
import sys, dataclasses; sys.path[:0]=['bench','src']
import numpy as np
from pathlib import Path
import headrace, headrace.synth as synth, gpu
from headrace.gguf.reader import open_gguf
from headrace.model.loader import load_decoder
from headrace.cuda.gpu import CUDADevice
from headrace.cuda.runner import CUDARunner, best_options
print(headrace.__file__)
def mini(name, layers=4):
    p=Path(f'/tmp/mini-{name}.gguf'); s=synth.SHAPES[name]; f=dataclasses.fields(s)
    synth.SHAPES['mini']=dataclasses.replace(s, **{f[1].name: layers, f[7].name: 16384})
    if not p.exists(): synth.write_synthetic(p,'mini','Q4_K_M')
    return load_decoder(open_gguf(p))
gpu.REPEATS=6
depths=(0,4096,16384)
for name in ('llama-8b','llama-1b'):
    d=mini(name)
    for kind in sys.argv[1:]:
        g=CUDADevice(); o={} if kind=='base' else {'cache_type':kind}
        r=CUDARunner(d,g,max_rows=64,**o,**best_options(g)); r.allocate_cache(16384//64+24)
        row=[f"{gpu.decode(r,depth)['us']['median']:.1f}" for depth in depths]
        print(name,kind,'token us at',depths,row,flush=True)
        for depth in depths:
            print('   ',depth,{x['kind']:round(x['us'],2) for x in gpu.breakdown(r,depth) if 'Attend' in x['kind'] or 'QKV' in x['kind']},flush=True)
        for depth,n in ((0,1024),(15360,1024)):
            print('    prompt',depth,n,{x['kind']:round(x['us'],1) for x in gpu.breakdown(r,depth,n) if 'Attend' in x['kind'] or 'QKV' in x['kind']},flush=True)
        print('   ',[(x['rows'],round(x['us']['median'],1)) for x in gpu.row_curve(r,[8,32])],flush=True)
        r.close()
