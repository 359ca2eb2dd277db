//! In which order modules are loaded: `modules.dep` and `modules.softdep`.

use std::collections::{HashMap, HashSet};

use super::alias::Aliases;

/// A module file, relative to the modules' directory.
pub(crate) type File = String;

/// What each module needs.
#[derive(Debug, Default)]
pub(crate) struct Dependencies {
    /// The module's file and those that it needs, the nearest first.
    hard: HashMap<String, (File, Vec<File>)>,
    /// Modules that should be there before, and after.
    soft: HashMap<String, (Vec<String>, Vec<String>)>,
}

impl Dependencies {
    /// Reads both files' texts. A soft dependency may be an alias, as `crc32c` is, for whichever
    /// modules there are.
    pub(crate) fn parse(dep: &str, softdep: &str, aliases: &Aliases) -> Self {
        let mut dependencies = Self::default();
        for line in dep.lines() {
            if let Some((file, needed)) = line.split_once(':') {
                let needed = needed.split_ascii_whitespace().map(str::to_owned);
                dependencies.hard.insert(
                    super::name_of_file(file),
                    (file.to_owned(), needed.collect()),
                );
            }
        }
        for line in softdep.lines() {
            let mut words = line.split_ascii_whitespace();
            let (Some("softdep"), Some(module)) = (words.next(), words.next()) else {
                continue;
            };
            let (pre, post) = dependencies.soft.entry(super::name(module)).or_default();
            let mut to = None;
            for word in words {
                match word {
                    "pre:" => to = Some(true),
                    "post:" => to = Some(false),
                    other => {
                        let list = match to {
                            Some(true) => &mut *pre,
                            Some(false) => &mut *post,
                            None => continue,
                        };
                        let other = super::name(other);
                        match dependencies.hard.contains_key(&other) {
                            true => list.push(other),
                            false => list.extend(aliases.modules(&other).map(str::to_owned)),
                        }
                    }
                }
            }
        }
        dependencies
    }

    /// The files to load for `module`, in order, each once. Unknown modules give none.
    pub(crate) fn order(&self, module: &str) -> Vec<File> {
        let mut order = Vec::new();
        self.visit(module, &mut HashSet::new(), &mut order);
        order
    }

    fn visit(&self, module: &str, seen: &mut HashSet<String>, order: &mut Vec<File>) {
        let Some((file, needed)) = self.hard.get(module) else {
            return;
        };
        if !seen.insert(module.to_owned()) {
            return;
        }
        let none = (Vec::new(), Vec::new());
        let (pre, post) = self.soft.get(module).unwrap_or(&none);
        pre.iter()
            .for_each(|module| self.visit(module, seen, order));
        for file in needed.iter().rev() {
            self.visit(&super::name_of_file(file), seen, order);
        }
        order.push(file.clone());
        post.iter()
            .for_each(|module| self.visit(module, seen, order));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
kernel/fs/xfs/xfs.ko.xz: kernel/lib/libcrc32c.ko.xz kernel/crypto/crc32c_generic.ko.xz
kernel/lib/libcrc32c.ko.xz: kernel/crypto/crc32c_generic.ko.xz
kernel/crypto/crc32c_generic.ko.xz:
kernel/arch/x86/crypto/crc32c-intel.ko.xz:
kernel/arch/x86/kvm/kvm.ko.xz: kernel/virt/lib/irqbypass.ko.xz
kernel/virt/lib/irqbypass.ko.xz:
kernel/arch/x86/kvm/kvm-amd.ko.xz: kernel/arch/x86/kvm/kvm.ko.xz kernel/virt/lib/irqbypass.ko.xz
kernel/a.ko: kernel/b.ko
kernel/b.ko: kernel/a.ko
";

    fn names(order: &[File]) -> Vec<String> {
        order
            .iter()
            .map(|file| super::super::name_of_file(file))
            .collect()
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let dependencies = Dependencies::parse(DEP, "", &Aliases::default());
        assert_eq!(
            names(&dependencies.order("kvm_amd")),
            ["irqbypass", "kvm", "kvm_amd"]
        );
        assert_eq!(
            names(&dependencies.order("xfs")),
            ["crc32c_generic", "libcrc32c", "xfs"]
        );
        assert!(dependencies.order("nonsense").is_empty());
    }

    #[test]
    fn soft_dependencies_come_where_they_are_wanted() {
        let soft = "softdep libcrc32c pre: crc32c-intel absent post: irqbypass\n";
        let dependencies = Dependencies::parse(DEP, soft, &Aliases::default());
        assert_eq!(
            names(&dependencies.order("libcrc32c")),
            ["crc32c_intel", "crc32c_generic", "libcrc32c", "irqbypass"]
        );
    }

    #[test]
    fn a_soft_dependency_may_be_an_alias() {
        let aliases = Aliases::parse("alias crc32c crc32c_intel\nalias crc32c crc32c_generic\n");
        let soft = "softdep xfs pre: crc32c\n";
        let dependencies = Dependencies::parse(DEP, soft, &aliases);
        assert_eq!(
            names(&dependencies.order("xfs")),
            ["crc32c_intel", "crc32c_generic", "libcrc32c", "xfs"]
        );
    }

    #[test]
    fn a_circle_ends() {
        assert_eq!(
            names(&Dependencies::parse(DEP, "", &Aliases::default()).order("a")),
            ["b", "a"]
        );
    }
}
