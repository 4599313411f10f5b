@0xc5a1f0de92b6437b;
# The body of a template's `state` file; what stands in front of it, and what the fields mean together, is in
# proto/template.py. Read as hostile bytes: a template may come from anywhere.

struct Template {
  description @0 :Text;     # JSON: the machine (orchestrator/machine.py)
  cpu @1 :Cpu;
  memorySize @2 :UInt64;    # bytes of guest RAM, a multiple of 4096
  layers @3 :Data;          # a byte per chunk of 64 KiB: 0 zero, 1 this template's memory, N parents[N-2]'s; empty: no memory
  sums @4 :Data;            # CRC-32C per chunk, little-endian, 0 where the layer is 0
  parents @5 :List(Parent); # the base, its base, and so on
  disks @6 :Text;           # JSON (orchestrator/templates.py)
  components @7 :List(Component);
}

struct Cpu {
  cpuid @0 :Data;           # struct kvm_cpuid_entry2 after the other: vCPU 0's table
  msrs @1 :List(UInt32);    # the MSRs that the vCPUs' states hold
  xsaveSize @2 :UInt32;     # bytes of a vCPU's extended state
}

struct Parent {
  path @0 :Text;            # absolute, of the directory
  identity @1 :Data;        # BLAKE2b-256 of its state file
}

struct Component {
  name @0 :Text;            # docs/internals.md, "Snapshots"
  version @1 :UInt16;       # of `data`, counted per kind of component (core/snapshot/upgrade.py)
  data @2 :Data;
}
