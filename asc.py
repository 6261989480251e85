import torch
exec(open('/tmp/lab/pr/options.py').read().split("for n,vol")[0])
from modelzip.kernels.obs_columns import obs_columns
from dataclasses import replace
def adaptive(w,f,n_out,bs,tot):
    n=w.shape[1]
    rem=w.T[f.order].contiguous(); U=f.upper; out=torch.empty_like(rem); gone=0
    for s in range(0,n,bs):
        e=min(n,s+bs); costs=(rem[s:]/U.diagonal()[s:,None]).square()
        m=without_smallest_of_all(costs,tot-gone)[:e-s]; gone+=int((~m).sum())
        d=obs_columns(rem[s:e],U[s:e,s:e],kept=m,value_dtype=torch.float32); out[f.order[s:e]]=d.written
        rem[e:].addmm_(U[s:e,e:].T,d.errors,alpha=-1)
    return out.T
def ordered(h,p):
    f=inverse_factor(h[p][:,p].contiguous(),damping=.01,max_damping=1.,order="none"); return replace(f,order=p)
if __name__=="__main__":
  for n,vol in ((256,1.0),(576,1.0),(576,.3)):
    res={}
    for seed in range(2):
      h=correlated(n,seed=seed,outl=vol); w=torch.randn(n,n,generator=torch.Generator().manual_seed(9+seed))
      d=h.diagonal(); inv=torch.linalg.inv((h+.01*d.mean()*torch.eye(n)).double()).diagonal().float()
      for name,p in dict(none=torch.arange(n),desc=d.argsort(descending=True),asc=d.argsort(),ascpivot=inv.argsort(descending=True)).items():
        f=ordered(h,p)
        for bs in (32,128): res.setdefault(f"adaptive {bs} {name}",[]).append(err(w,adaptive(w,f,n,bs,n*n//2),h))
        for bs in (128,): res.setdefault(f"block {bs} {name}",[]).append(err(w,sparsegpt(w,f,.5,dtype=torch.float32)[0],h))
        if n%4==0: 
          g=d.reshape(-1,4).sum(1); q={"none":p,"desc":None}.get(name)
          p4=torch.arange(n) if name=="none" else (torch.arange(n).reshape(-1,4)[g.argsort(descending=name=="desc")].reshape(-1))
          res.setdefault(f"2:4 {name if name!='ascpivot' else 'asc'}",[]).append(err(w,sparsegpt(w,ordered(h,p4),(2,4),dtype=torch.float32)[0],h))
    print(n,vol); [print(f"  {k:32s} {sum(v)/len(v):.4f}") for k,v in sorted(res.items(),key=lambda t:sum(t[1])/len(t[1]))]
