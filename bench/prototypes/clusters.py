"""Attention at depth on a four-layer 8B: variants side by side. usage: depth.py"""
import sys; sys.path[:0]=['bench/prototypes','bench','src']
import numpy as np, mini, gpu
from headrace.cuda import launchers as L
from headrace.cuda.runner import CUDARunner
from headrace.cuda.steps import Step
from headrace.backend import Batch, PAGE_SIZE
d=mini.mini('llama-8b')
def run(name):
    r=CUDARunner(d,max_rows=8,tensor_rows=None,prompt_rows=0); r.allocate_cache(300)
    ex=r.executor; dev=ex.device
    table=np.arange(300,dtype=np.int32)[None]
    out=[]; ref={}
    for depth in (0,200,1000,2000,4096,8192,16384):
        pos=np.array([depth],np.int32)
        ex.bring(Batch(pos*0+5,pos,pos*0,table,pos*0))
        step=Step(1,max(64,1<<int(depth).bit_length()),((0,1),))
        ls=ex.lowering.launches(step); dev.prepare(l.spec for l in ls)
        at=[l for l in ls if l.spec.name=='attend']*8
        g=dev.capture(lambda: [dev.launch(l) for l in at]); alone=gpu.timed(dev,g.launch)['median']/len(at); g.close()
        layers=[l for l in ls if l.spec.name not in('embed',)][:-1]*4
        g=dev.capture(lambda: [dev.launch(l) for l in layers]); whole=gpu.timed(dev,g.launch)['median']/16; g.close()
        ex.run(ls); x=ex.download(ex.lowering.arena['logits'])
        ref[depth]=x
        out.append(f"{depth}: {alone:.1f}/{whole:.1f}")
    print(f"{name:28} attend alone / a layer, us  "+"  ".join(out),flush=True); r.close(); return ref
base=None
def variant(name, **kw):
    global base
    old={k:getattr(L,k) for k in kw}
    for k,v in kw.items(): setattr(L,k,v)
    try:
        x=run(name)
        if base is None: base=x
        else: print("   largest difference", [f"{k}: {np.abs(x[k]-base[k]).max()/np.abs(base[k]).max():.1e}" for k in x],flush=True)
    except Exception as e: print(name,'FAILED',repr(e)[:300],flush=True)
    for k,v in old.items(): setattr(L,k,v)
no=lambda *a: False
variant('last block joins, 4 warps', in_clusters=no)
variant('clusters, 4 warps x 128')
variant('clusters, 4 x 128, no prefetch', ATTEND_PREFETCH=False)
variant('clusters, 8 warps x 256', ATTEND_WARPS=8, SPLIT=256)
variant('clusters of 8, 8 x 256', ATTEND_WARPS=8, SPLIT=256, CLUSTER=8, in_clusters=lambda *a: True)
variant('last block joins, again', in_clusters=no)
