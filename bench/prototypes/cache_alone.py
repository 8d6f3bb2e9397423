"""attend and prompt_attend alone, over eight fabricated caches in turn."""
import sys, numpy as np
sys.path[:0]=['bench']; import gpu
from headrace.cuda import arguments as c, launchers
from headrace.cuda.compile import Specialisation
from headrace.cuda.gpu import CUDADevice
from headrace.cuda.launchers import CacheShape
from headrace.cuda.products import Activations
from headrace.cuda.device import array
from dataclasses import replace
gpu.REPEATS=7
d=CUDADevice(); N=8; PAGES=264
def buf(n):
    a=d.allocate(n,'x'); d.clear(a,n); return a
def up(x):
    a=d.allocate(max(x.nbytes,16),'x'); d.upload(a,x); return a
how=dict(scale=.1,window=None,softcap=None)
for heads,kv,dim in ((32,8,128),(32,8,64)):
    for q8,early in ((False,None),(True,0),(True,1)):
        s=CacheShape(heads,kv,dim,dim,quantised=q8); pb=s.page_bytes()
        caches=[(buf(pb*PAGES),buf(pb*PAGES)) for _ in range(N)]
        table=up(np.arange(PAGES,dtype=np.int32)); slots=up(np.zeros(1024,np.int32))
        q=up(np.random.default_rng(0).standard_normal((1024,heads*dim)).astype(np.float32))
        most=launchers.max_splits(d,heads,kv)
        work=[buf(4*heads*most*dim),buf(8*heads*most),buf(4096)]
        place=array(buf(1024*heads*dim*4),(1024,heads*dim),np.float32)
        out=Activations(heads*dim,1024,None,place,array(buf(1024*heads*dim),(1024,1),np.float32),None).at(0)
        brain=Activations(heads*dim,1024,None,None,None,None,place).at(0)
        def launch(cache,first,n):
            pos=up(np.arange(first,first+n,dtype=np.int32))
            cc=c.Cache(*cache,table,pos,slots,PAGES)
            if n>1: l=launchers.prompt_attend(d,s,c.PromptAttend(q,cc,brain,n),**how)
            else:
                l=launchers.attend(d,s,make(q,cc,out,*work),1,1<<first.bit_length(),**how)
            if early is not None:
                l=replace(l,spec=Specialisation(l.spec.name,tuple(sorted({**dict(l.spec.macros),'VALUES_EARLY':str(early)}.items()))))
            return l
        make=c.Attend
        row=[]
        for first,n in ((0,1),(1023,1),(4096,1),(16384,1),(0,1024),(15360,1024)):
            if n>1 and early==0: continue
            ls=[launch(x,first,n) for x in caches]; d.prepare(l.spec for l in ls)
            g=d.capture(lambda: [d.launch(l) for l in ls*2]); t=gpu.timed(d,g.launch); g.close()
            row.append((first,n,round(t['median']/16,2)))
        print(dim,'q8' if q8 else 'f16',early,row,flush=True)
        for a in caches: d.free(a[0]),d.free(a[1])
